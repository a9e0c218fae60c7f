// Opens ComfyUI's front end in headless Chromium, loads each workflow as if a user dropped its file on the canvas, and runs it.
// node open_workflows.cjs URL CHROMIUM PROFILE_FOLDER RENDERER OPEN_ONLY WORKFLOW.json ...
// OPEN_ONLY: names of workflows that are opened but not run, with commas between.
// RENDERER: classic (canvas) or vue (Nodes 2.0). Prints one JSON object: what the front end made of each workflow, what Measure
// Against Truth showed beside photo_physical, and every error on the console.
const fs = require("fs")
const path = require("path")
const { chromium } = require("playwright-core")

const [url, executablePath, profile, renderer, openOnly, ...files] = process.argv.slice(2)
const args = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"

async function open(page, file) {
  const workflow = JSON.parse(fs.readFileSync(file, "utf8"))
  return page.evaluate(async (workflow) => {
    await app.loadGraphData(workflow)
    const nodes = app.graph._nodes
    const prompt = await app.graphToPrompt()
    return {
      types: nodes.map((node) => node.type),
      missing: nodes.filter((node) => !LiteGraph.registered_node_types[node.type]).map((node) => node.type),
      prompt: prompt.output,
    }
  }, workflow)
}

// Presses Run and waits until nothing is queued; returns what each node shows.
async function run(page) {
  await page.evaluate(() => app.queuePrompt(0))
  const end = Date.now() + 900000
  for (let idle = 0; idle < 2; ) {
    if (Date.now() > end) throw new Error("the workflow did not end")
    await page.waitForTimeout(400)
    const queue = await page.evaluate(async () => (await fetch("/queue")).json())
    idle = queue.queue_running.length + queue.queue_pending.length ? 0 : idle + 1
  }
  await page.waitForTimeout(1000) // let the pictures be drawn
  return page.evaluate(() =>
    Object.fromEntries(
      app.graph._nodes.map((node) => {
        const output = app.nodeOutputs[node.id]
        return [node.type, node.type === "BokehDefocus" ? (output?.bokeh_focus ?? []).length : (output?.images ?? []).length]
      })
    )
  )
}

// Adds Measure Against Truth to the open workflow, runs it, and returns what it shows and what of it would be saved and sent.
async function measure(page) {
  await page.evaluate(() => {
    const one = (type) => app.graph._nodes.find((node) => node.type === type)
    const node = LiteGraph.createNode("BokehMeasure")
    node.pos = [1240, 720]
    app.graph.add(node)
    const join = (type, name) => one(type).connect(0, node, node.findInputSlot(name))
    join("BokehRender", "result")
    join("LoadImage", "truth")
    join("BokehDefocus", "defocus")
    app.queuePrompt(0)
  })
  const shown = () => app.graph._nodes.find((node) => node.type === "BokehMeasure").widgets[0].element.textContent
  await page.waitForFunction(shown, null, { timeout: 240000 })
  return page.evaluate(async () => {
    const node = app.graph._nodes.find((node) => node.type === "BokehMeasure")
    const element = node.widgets[0].element
    return {
      text: element.textContent,
      height: element.querySelector(".bokeh-scores").getBoundingClientRect().height,
      saved: node.serialize().widgets_values ?? [],
      inputs: Object.keys((await app.graphToPrompt()).output[node.id].inputs),
    }
  })
}

async function main() {
  const context = await chromium.launchPersistentContext(profile, {
    executablePath,
    headless: true,
    args: args.split(" "),
    viewport: { width: 1600, height: 900 },
  })
  const errors = []
  try {
    const page = await context.newPage()
    page.on("console", (message) => message.type() === "error" && errors.push(`${message.text()} ${message.location().url}`))
    page.on("pageerror", (error) => errors.push(String(error.stack ?? error)))
    await page.goto(url, { waitUntil: "domcontentloaded" })
    await page.waitForFunction(
      () => window.app?.graph && window.LiteGraph?.registered_node_types.BokehRender && document.querySelector("canvas"),
      null,
      { timeout: 120000 }
    )
    await page.evaluate((vue) => app.extensionManager.setting.set("Comfy.VueNodes.Enabled", vue), renderer === "vue")
    const workflows = {}
    let scores = null
    for (const file of files) {
      const name = path.basename(file, ".json")
      workflows[name] = await open(page, file)
      if (!openOnly.split(",").includes(name)) workflows[name].outputs = await run(page)
      workflows[name].drawn = await page.evaluate(() => document.querySelectorAll("[data-node-id]").length)
      await page.keyboard.press("Escape") // the list of missing models, over the workflows that are only opened
      if (name === "photo_physical") scores = await measure(page)
      await page.screenshot({ path: path.join(profile, name + ".png") })
    }
    console.log(JSON.stringify({ workflows, scores, errors }))
  } finally {
    await context.close()
  }
}

main().catch((error) => {
  console.error(error)
  process.exit(1)
})
