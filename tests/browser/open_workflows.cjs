// Opens ComfyUI's front end in headless Chromium, loads each workflow as if a user dropped its file on the canvas, and runs it.
// node open_workflows.cjs URL CHROMIUM PROFILE_FOLDER WORKFLOW.json ...
// Prints one JSON object: what the front end made of each workflow, and every error on the console.
const fs = require("fs")
const path = require("path")
const { chromium } = require("playwright-core")

const [url, executablePath, profile, ...files] = process.argv.slice(2)
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

// Presses Run and waits for the last node; returns what each node shows.
async function run(page) {
  await page.evaluate(() => app.queuePrompt(0))
  await page.waitForFunction(
    () => app.graph._nodes.some((node) => /^Save/.test(node.type) && app.nodeOutputs[node.id]?.images),
    null,
    { timeout: 240000 }
  )
  await page.waitForTimeout(1000) // let the pictures be drawn
  return page.evaluate(() =>
    Object.fromEntries(app.graph._nodes.map((node) => [node.type, app.nodeOutputs[node.id]?.images ?? []]))
  )
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
    const workflows = {}
    for (const file of files) {
      const name = path.basename(file, ".json")
      workflows[name] = await open(page, file)
      workflows[name].outputs = await run(page)
      await page.screenshot({ path: path.join(profile, name + ".png") })
    }
    console.log(JSON.stringify({ workflows, errors }))
  } finally {
    await context.close()
  }
}

main().catch((error) => {
  console.error(error)
  process.exit(1)
})
