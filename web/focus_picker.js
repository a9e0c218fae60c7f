// Shows the picture on Set Focus and Blur and sets the focus where it is clicked. What will be sharp keeps its colours at once, before
// anything is run again: the node hands out a small depth map beside the picture.
import { api } from "../../scripts/api.js"
import { app } from "../../scripts/app.js"

const NEAR = [255, 115, 26] // the tints of the overlay output (optics/overlay.py)
const FAR = [38, 115, 255]
const OUTLINE = [90, 255, 90]
const LONG_SIDE = 512 // px of the canvas; pictures without depth are shrunk to it
const STEP = 0.005 // of the picture, for the arrow keys; ten times that with Shift
const HINTS = {
  en: { click: "click or drag: focus here", linked: "the focus comes from a connected input", empty: "connect a picture, or run once to see it" },
  zh: { click: "点击或拖动：对焦于此", linked: "焦点由连接的输入决定", empty: "请连接图片，或先运行一次" },
  ja: { click: "クリックまたはドラッグでここにピント", linked: "ピントは接続された入力で決まります", empty: "画像を接続するか、一度実行してください" },
}

const pickers = new WeakMap()

function hint(word) {
  const language = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en"
  return (HINTS[language] ?? HINTS.en)[word]
}

function address(file) {
  return api.apiURL(`/view?${new URLSearchParams({ filename: file.filename, subfolder: file.subfolder ?? "", type: file.type ?? "input" })}`)
}

function loadPicture(url) {
  return new Promise((resolve, reject) => {
    const picture = new Image()
    picture.onload = () => resolve(picture)
    picture.onerror = reject
    picture.src = url
  })
}

function pixels(picture, width, height) {
  const canvas = document.createElement("canvas")
  canvas.width = width
  canvas.height = height
  const context = canvas.getContext("2d", { willReadFrequently: true })
  context.drawImage(picture, 0, 0, width, height)
  return context.getImageData(0, 0, width, height)
}

// The picture that feeds the node's image input as far as the graph shows it before a run: that of a Load Image, or one drawn on a node.
function upstream(node) {
  let slot = node.inputs?.find((input) => input.name === "image")
  for (let hops = 0; slot?.link != null && hops < 32; hops++) {
    const links = node.graph?.links
    const link = node.graph?.getLink?.(slot.link) ?? links?.get?.(slot.link) ?? links?.[slot.link]
    node = link && node.graph.getNodeById(link.origin_id)
    if (!node) return null
    const file = node.type === "LoadImage" && node.widgets?.find((widget) => widget.name === "image")?.value
    if (typeof file === "string" && file) {
      const parts = file.replace(/ \[(input|output|temp)\]$/, "").split("/")
      const type = file.match(/ \[(input|output|temp)\]$/)?.[1] ?? "input"
      return address({ filename: parts.pop(), subfolder: parts.join("/"), type })
    }
    if (node.imgs?.[0]?.src) return node.imgs[0].src
    slot = node.inputs?.length === 1 ? node.inputs[0] : node.inputs?.find((input) => input.type === "IMAGE") // reroutes, resizing
  }
  return null
}

class Picker {
  constructor(node) {
    this.node = node
    this.views = [] // what the node handed out: [{frame, photo, depth, low, high, focus, k, blur_from, strength}]
    this.shown = 0
    this.element = document.createElement("div")
    this.element.style.cssText = "display: flex; flex-direction: column; gap: 4px; width: 100%; height: 100%; overflow: hidden"
    this.canvas = document.createElement("canvas")
    this.canvas.className = "bokeh-focus"
    this.canvas.tabIndex = 0
    this.canvas.style.cssText = "min-height: 0; flex: 1 1 auto; object-fit: contain; cursor: crosshair; touch-action: none; outline-offset: -2px"
    this.canvas.width = 3
    this.canvas.height = 2
    this.strip = document.createElement("div")
    this.strip.style.cssText = "display: none; gap: 4px; justify-content: center"
    this.note = document.createElement("div")
    this.note.style.cssText = "font-size: 11px; opacity: 0.7; text-align: center"
    this.element.append(this.canvas, this.strip, this.note)
    this.canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return
      event.stopPropagation()
      this.canvas.setPointerCapture(event.pointerId) // the host keeps pointer events from the window
      this.canvas.focus({ preventScroll: true })
      this.pick(event)
    })
    this.canvas.addEventListener("pointermove", (event) => this.canvas.hasPointerCapture(event.pointerId) && this.pick(event))
    this.canvas.addEventListener("keydown", (event) => this.nudge(event))
  }

  widget(name) {
    return this.node.widgets?.find((widget) => widget.name === name)
  }

  linked(name) {
    return this.node.inputs?.some((input) => input.widget?.name === name && input.link != null)
  }

  get locked() {
    return ["focus", "focus_x", "focus_y"].some((name) => this.linked(name))
  }

  write(name, value) {
    const widget = this.widget(name)
    if (!widget || widget.value === value) return
    widget.value = value
    widget.callback?.(value, app.canvas, this.node)
  }

  pick(event) {
    const box = this.drawn()
    this.focusAt((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height)
  }

  nudge(event) {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key]
    if (!way) return
    event.preventDefault()
    event.stopPropagation()
    const step = event.shiftKey ? 10 * STEP : STEP
    this.focusAt(this.widget("focus_x").value + way[0] * step, this.widget("focus_y").value + way[1] * step)
  }

  focusAt(x, y) {
    if (this.locked) return
    const within = (value) => Math.round(Math.min(1, Math.max(0, value)) * 1000) / 1000
    this.write("focus", "point")
    this.write("focus_x", within(x))
    this.write("focus_y", within(y))
    this.draw()
    this.node.graph?.setDirtyCanvas?.(true, true)
  }

  // Where the picture lies on the screen inside the canvas element, which keeps the picture's shape by object-fit.
  drawn() {
    const box = this.canvas.getBoundingClientRect()
    const scale = Math.min(box.width / this.canvas.width, box.height / this.canvas.height)
    const width = this.canvas.width * scale
    const height = this.canvas.height * scale
    return { left: box.left + (box.width - width) / 2, top: box.top + (box.height - height) / 2, width, height }
  }

  async show(views) {
    this.views = await Promise.all(
      views.map(async (view) => {
        const [photo, depth] = await Promise.all([loadPicture(address(view.photo)), loadPicture(address(view.depth))])
        const { width, height } = depth
        const levels = pixels(depth, width, height).data
        const map = new Float32Array(width * height) // 16 bit in red and green
        for (let i = 0; i < map.length; i++) map[i] = view.low + ((view.high - view.low) * (256 * levels[4 * i] + levels[4 * i + 1])) / 65535
        return { ...view, width, height, map, picture: pixels(photo, width, height) }
      })
    )
    this.before = null
    this.shown = Math.min(this.shown, this.views.length - 1)
    this.strip.style.display = this.views.length > 1 ? "flex" : "none"
    this.strip.replaceChildren(
      ...this.views.map((view, index) => {
        const button = document.createElement("button")
        button.textContent = view.frame
        button.style.cssText = "font-size: 11px; padding: 0 6px; cursor: pointer"
        button.onclick = () => {
          this.shown = index
          this.draw()
        }
        return button
      })
    )
    this.draw()
  }

  // Before the first run: the plain picture from upstream.
  async preview() {
    if (this.views.length) return this.draw()
    const url = upstream(this.node)
    if (url && url !== this.before?.url) {
      this.before = { url }
      const picture = await loadPicture(url).catch(() => null)
      if (picture && this.before?.url === url && !this.views.length) {
        const scale = Math.min(1, LONG_SIDE / Math.max(picture.width, picture.height))
        const [width, height] = [picture.width, picture.height].map((side) => Math.max(1, Math.round(side * scale)))
        this.before = { url, width, height, picture: pixels(picture, width, height) }
      }
    } else if (!url) this.before = null
    this.draw()
  }

  point() {
    return this.widget("focus")?.value === "point" ? [this.widget("focus_x").value, this.widget("focus_y").value] : null
  }

  // Disparity in focus in this view: under the point, as far as the small map tells, or as the node found it.
  plane(view) {
    const point = this.point()
    if (!point || this.locked) return view.focus
    const holds = !this.widget("follow")?.value
    const at = holds ? this.views[0] : view // held focus is measured in the first frame
    const column = Math.min(at.width - 1, Math.floor(point[0] * at.width))
    const row = Math.min(at.height - 1, Math.floor(point[1] * at.height))
    const around = []
    for (let y = Math.max(0, row - 1); y <= Math.min(at.height - 1, row + 1); y++)
      for (let x = Math.max(0, column - 1); x <= Math.min(at.width - 1, column + 1); x++) around.push(at.map[y * at.width + x])
    return around.sort((a, b) => a - b)[around.length >> 1]
  }

  draw() {
    const view = this.views[this.shown] ?? (this.before?.picture ? this.before : null)
    this.note.textContent = hint(view ? (this.locked ? "linked" : "click") : "empty")
    this.canvas.style.display = view ? "block" : "none"
    if (!view) return
    this.canvas.width = view.width
    this.canvas.height = view.height
    const context = this.canvas.getContext("2d")
    context.putImageData(view.map ? this.tinted(view) : view.picture, 0, 0)
    const point = this.point()
    if (point) cross(context, point[0] * view.width, point[1] * view.height)
  }

  tinted(view) {
    const { width, height, map } = view
    const focus = this.plane(view)
    const strength = this.linked("strength") || this.node.inputs?.some((input) => input.name === "lens" && input.link != null)
    const k = strength || !view.strength ? view.k : (view.k * this.widget("strength").value) / view.strength
    const sharp = new Float32Array(map.length)
    let strongest = 1e-6
    for (let i = 0; i < map.length; i++) {
      const radius = Math.abs(k * (map[i] - focus))
      const t = Math.min(1, Math.max(0, radius / view.blur_from - 1))
      sharp[i] = 1 - t * t * (3 - 2 * t)
      strongest = Math.max(strongest, radius)
    }
    const result = new ImageData(new Uint8ClampedArray(view.picture.data), width, height)
    const data = result.data
    for (let i = 0; i < map.length; i++) {
      const signed = k * (map[i] - focus)
      const deep = Math.sqrt(Math.abs(signed) / strongest)
      const grey = 0.25 + (0.75 * (0.2126 * data[4 * i] + 0.7152 * data[4 * i + 1] + 0.0722 * data[4 * i + 2])) / 255
      const tint = signed > 0 ? NEAR : FAR
      const right = (i + 1) % width ? i + 1 : i
      const below = i + width < map.length ? i + width : i
      const edge = sharp[i] > 0.5 !== sharp[right] > 0.5 || sharp[i] > 0.5 !== sharp[below] > 0.5
      for (let c = 0; c < 3; c++) {
        const tinted = grey * (tint[c] * deep + 255 * 0.7 * (1 - deep))
        data[4 * i + c] = edge ? OUTLINE[c] : tinted + (data[4 * i + c] - tinted) * sharp[i]
      }
    }
    return result
  }
}

function cross(context, x, y) {
  for (const [style, width] of [
    ["black", 4],
    ["white", 2],
  ]) {
    context.strokeStyle = style
    context.lineWidth = width
    context.beginPath()
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
      context.moveTo(x + 5 * dx, y + 5 * dy)
      context.lineTo(x + 14 * dx, y + 14 * dy)
    }
    context.stroke()
  }
}

function receive(node, output) {
  const views = output?.bokeh_focus
  if (views?.length) pickers.get(node)?.show(views).catch(() => {}) // pictures of an earlier session may be gone
}

app.registerExtension({
  name: "bokeh.focus_picker",
  nodeCreated(node) {
    if (node.comfyClass !== "BokehDefocus") return
    const picker = new Picker(node)
    pickers.set(node, picker)
    // Neither part of the prompt nor of the saved workflow, so that widget values keep their places.
    const widget = node.addDOMWidget("focus_picker", "bokeh_focus_picker", picker.element, { serialize: false, getMinHeight: () => 220 })
    widget.serialize = false
    node.setSize([Math.max(node.size[0], 340), Math.max(node.size[1], 560)])
    for (const name of ["strength", "focus", "focus_x", "focus_y", "follow"]) {
      const typed = picker.widget(name)
      if (!typed) continue
      const callback = typed.callback
      typed.callback = function () {
        const result = callback?.apply(this, arguments)
        picker.draw()
        return result
      }
    }
    const executed = node.onExecuted
    node.onExecuted = function (output) {
      executed?.apply(this, arguments)
      receive(this, output)
    }
    const changed = node.onConnectionsChange
    node.onConnectionsChange = function () {
      changed?.apply(this, arguments)
      queueMicrotask(() => picker.preview())
    }
    picker.element.addEventListener("pointerenter", () => picker.preview()) // another file may have been chosen upstream
    setTimeout(() => picker.preview(), 300) // once the graph is complete
  },
  // After a reload or a change of tabs the front end hands out what it remembers.
  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs)) {
      const node = app.graph.getNodeById(id)
      if (node) receive(node, output)
    }
  },
})
