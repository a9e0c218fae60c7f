// Sets the focus by clicking, dragging and arrow keys in the real front end, on photo_physical, and drags a keyframe on video_focus_pull.
// node pick_focus.cjs URL CHROMIUM PROFILE_FOLDER RENDERER WORKFLOWS_FOLDER
// Prints one JSON object of what was seen at each step.
const fs = require("fs")
const path = require("path")
const { chromium } = require("playwright-core")

const [url, executablePath, profile, renderer, folder] = process.argv.slice(2)
const args = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"

async function load(page, name) {
  const workflow = JSON.parse(fs.readFileSync(path.join(folder, name + ".json"), "utf8"))
  await page.evaluate((workflow) => app.loadGraphData(workflow), workflow)
  await page.waitForTimeout(800) // some front ends fit the graph to the screen a moment later
  await show(page, "BokehDefocus")
}

// Brings a node to the top left, clear of the bars at the edges, at its full size.
async function show(page, type) {
  await page.evaluate((type) => {
    const node = app.graph._nodes.find((node) => node.type === type)
    app.canvas.ds.scale = 1
    app.canvas.ds.offset = [140 - node.pos[0], 160 - node.pos[1]]
    app.canvas.setDirty(true, true)
  }, type)
  await page.waitForTimeout(800)
}

async function run(page) {
  await page.evaluate(() => {
    window.lastSaved = JSON.stringify(app.graph._nodes.filter((n) => /^Save/.test(n.type)).map((n) => app.nodeOutputs[n.id] ?? null))
    app.queuePrompt(0)
  })
  await page.waitForFunction(
    () =>
      JSON.stringify(app.graph._nodes.filter((n) => /^Save/.test(n.type)).map((n) => app.nodeOutputs[n.id] ?? null)) !== window.lastSaved,
    null,
    { timeout: 240000 }
  )
  await page.waitForTimeout(1200)
  return page.evaluate(() => app.nodeOutputs[app.graph._nodes.find((n) => /^Save/.test(n.type)).id].images[0])
}

// Widget values, the pixels' checksum and the note of the picker of the first Set Focus and Blur node.
function state(page) {
  return page.evaluate(() => {
    const node = app.graph._nodes.find((n) => n.type === "BokehDefocus")
    const value = (name) => node.widgets.find((w) => w.name === name).value
    const canvas = document.querySelector("canvas.bokeh-focus")
    const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data
    let sum = 0
    for (let i = 0; i < data.length; i += 4) sum = (sum * 31 + data[i] + 3 * data[i + 1] + 7 * data[i + 2]) % 1000000007
    return {
      focus: value("focus"), x: value("focus_x"), y: value("focus_y"), sum, width: canvas.width, height: canvas.height,
      seen: canvas.getBoundingClientRect().height,
    }
  })
}

// Where a point of the picture (fractions) lies on the screen.
function spot(page, selector, x, y) {
  return page.evaluate(
    ([selector, x, y]) => {
      const canvas = document.querySelector(selector)
      const box = canvas.getBoundingClientRect()
      const fit = getComputedStyle(canvas).objectFit === "contain"
      const scale = fit ? Math.min(box.width / canvas.width, box.height / canvas.height) : 0
      const [width, height] = fit ? [canvas.width * scale, canvas.height * scale] : [box.width, box.height]
      return [box.left + (box.width - width) / 2 + x * width, box.top + (box.height - height) / 2 + y * height]
    },
    [selector, x, y]
  )
}

async function main() {
  const context = await chromium.launchPersistentContext(profile, { executablePath, headless: true, args: args.split(" "), viewport: { width: 1600, height: 1000 } })
  const errors = []
  const seen = { errors }
  try {
    const page = await context.newPage()
    page.on("console", (message) => message.type() === "error" && errors.push(`${message.text()} ${message.location().url}`))
    page.on("pageerror", (error) => errors.push(String(error.stack ?? error)))
    await page.goto(url, { waitUntil: "domcontentloaded" })
    await page.waitForFunction(() => window.app?.graph && window.LiteGraph?.registered_node_types.BokehRender && document.querySelector("canvas"), null, { timeout: 120000 })
    await page.evaluate((vue) => app.extensionManager.setting.set("Comfy.VueNodes.Enabled", vue), renderer === "vue")

    await load(page, "photo_physical")
    seen.before = await state(page) // the upstream photo, before any run
    await page.mouse.click(...(await spot(page, "canvas.bokeh-focus", 0.3, 0.6)))
    seen.early = await state(page)
    await load(page, "photo_physical")
    seen.first = await run(page)
    seen.ran = await state(page)
    await page.screenshot({ path: path.join(profile, "picker_ran.png") })
    await page.mouse.click(...(await spot(page, "canvas.bokeh-focus", 0.12, 0.85)))
    seen.clicked = await state(page)
    await page.screenshot({ path: path.join(profile, "picker_clicked.png") })
    seen.second = await run(page)
    await page.mouse.move(...(await spot(page, "canvas.bokeh-focus", 0.5, 0.5)))
    await page.mouse.down()
    await page.mouse.move(...(await spot(page, "canvas.bokeh-focus", 0.7, 0.4)), { steps: 4 })
    await page.mouse.up()
    seen.dragged = await state(page)
    await page.keyboard.press("ArrowRight")
    await page.keyboard.press("Shift+ArrowDown")
    seen.nudged = await state(page)
    seen.prompt = await page.evaluate(async () => {
      const node = app.graph._nodes.find((n) => n.type === "BokehDefocus")
      return (await app.graphToPrompt()).output[node.id].inputs
    })
    seen.reloaded = await page.evaluate(async () => {
      const saved = JSON.parse(JSON.stringify(app.graph.serialize()))
      const values = saved.nodes.find((n) => n.type === "BokehDefocus").widgets_values
      await app.loadGraphData(saved)
      const node = app.graph._nodes.find((n) => n.type === "BokehDefocus")
      const copy = node.clone()
      app.graph.add(copy)
      const read = (one) => Object.fromEntries(["focus", "focus_x", "focus_y"].map((name) => [name, one.widgets.find((w) => w.name === name).value]))
      return { values, node: read(node), copy: read(copy), pickers: app.graph._nodes.filter((n) => n.widgets?.some((w) => w.name === "focus_picker")).length }
    })
    seen.subgraph = await page.evaluate(async () => {
      if (!app.graph.convertToSubgraph) return null
      app.graph.remove(app.graph._nodes.filter((n) => n.type === "BokehDefocus")[1])
      const node = app.graph._nodes.find((n) => n.type === "BokehDefocus")
      const { subgraph } = app.graph.convertToSubgraph(new Set([node]))
      const inner = subgraph.nodes.find((n) => n.type === "BokehDefocus")
      const prompt = (await app.graphToPrompt()).output
      const sent = Object.values(prompt).find((n) => n.class_type === "BokehDefocus")
      return { picker: inner.widgets.some((w) => w.name === "focus_picker"), inputs: sent.inputs }
    })

    await load(page, "video_focus_pull")
    const track = () =>
      page.evaluate(() => {
        const node = app.graph._nodes.find((n) => n.type === "BokehFocusTrack")
        return node.widgets.find((w) => w.name === "keyframes").value
      })
    seen.track = [await track()]
    await page.evaluate(() => {
      const node = app.graph._nodes.find((n) => n.type === "BokehFocusTrack")
      const widget = node.widgets.find((w) => w.name === "keyframes")
      widget.value = "0: 0.2\n10: 0.8 ease\n20: (0.5, 0.5)"
    })
    await show(page, "BokehFocusTrack")
    const box = await page.evaluate(() => {
      const { left, top, width, height } = document.querySelector("canvas.bokeh-track").getBoundingClientRect()
      return { left, top, width, height }
    })
    const at = (frame, value) => [
      box.left + (box.width * (26 + (548 * frame) / 23)) / 600,
      box.top + (box.height * (200 - 26 - 148 * value)) / 200,
    ]
    await page.mouse.move(...at(10, 0.8))
    await page.mouse.down()
    await page.mouse.move(...at(14, 0.5), { steps: 3 })
    await page.mouse.up()
    seen.track.push(await track())
    await page.screenshot({ path: path.join(profile, "track.png") })
    console.log(JSON.stringify(seen))
  } finally {
    await context.close()
  }
}

main().catch((error) => {
  console.error(error)
  process.exit(1)
})
