// Draws the keyframes of Pull Focus Over Time and lets them be dragged; the text stays the only thing that is saved.
import { app } from "../../scripts/app.js"

const NUMBER = String.raw`[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?`
const KEY = new RegExp(String.raw`^\s*(\d+)\s*:\s*(?:(${NUMBER})|\(\s*(${NUMBER})\s*,\s*(${NUMBER})\s*\))(?:\s+([a-z-]+))?\s*$`)
const EASINGS = {
  linear: (t) => t,
  ease: (t) => t * t * (3 - 2 * t),
  "ease-in": (t) => t * t,
  "ease-out": (t) => t * (2 - t),
  hold: () => 0,
}
const WIDTH = 600 // px of the canvas
const HEIGHT = 200
const MARGIN = 26
const GRAB = 16

// [{frame, value | point, easing}] by frame, or null when the text can not be read. The grammar is that of optics/focus.py.
function parse(text) {
  try {
    if (text.trim().startsWith("["))
      return JSON.parse(text)
        .map((key) => (Array.isArray(key) ? { frame: key[0], value: key[1], easing: key[2] ?? "linear" } : { easing: "linear", ...key }))
        .map((key) => (Array.isArray(key.value) ? { ...key, point: key.value, value: undefined } : key))
        .sort((a, b) => a.frame - b.frame)
  } catch {
    return null
  }
  const keys = []
  for (const piece of text.split(/[,;\n](?![^(]*\))/)) {
    if (!piece.trim()) continue
    const match = piece.match(KEY)
    if (!match) return null
    const [, frame, value, x, y, easing] = match
    keys.push({ frame: +frame, ...(value === undefined ? { point: [+x, +y] } : { value: +value }), easing: easing ?? "linear" })
  }
  return keys.length ? keys.sort((a, b) => a.frame - b.frame) : null
}

function written(keys) {
  const short = (number) => String(Math.round(number * 1000) / 1000)
  return keys
    .map(({ frame, value, point, easing }) => {
      const where = point ? `(${point.map(short).join(", ")})` : short(value)
      return `${frame}: ${where}${easing === "linear" ? "" : " " + easing}`
    })
    .join("\n")
}

class Track {
  constructor(node) {
    this.node = node
    this.canvas = document.createElement("canvas")
    this.canvas.className = "bokeh-track"
    this.canvas.width = WIDTH
    this.canvas.height = HEIGHT
    this.canvas.style.cssText = "width: 100%; height: 100%; touch-action: none; cursor: grab; background: rgba(0, 0, 0, 0.25)"
    this.canvas.addEventListener("pointerdown", (event) => this.grab(event))
    this.canvas.addEventListener("pointermove", (event) => this.drag(event))
    this.canvas.addEventListener("pointerup", () => (this.held = null))
  }

  get widget() {
    return this.node.widgets?.find((widget) => widget.name === "keyframes")
  }

  get keys() {
    return parse(this.widget?.value ?? "")
  }

  // The frames and values the axes reach; fixed while a keyframe is held, so that it does not slip away under the pointer.
  range(keys) {
    const values = keys.filter((key) => !key.point).map((key) => key.value)
    return { last: Math.max(8, keys[keys.length - 1].frame * 1.15), low: Math.min(0, ...values), high: Math.max(1, ...values) }
  }

  place(key, range) {
    const x = MARGIN + ((WIDTH - 2 * MARGIN) * key.frame) / range.last
    const share = key.point ? 0.5 : (key.value - range.low) / (range.high - range.low)
    return [x, HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * share]
  }

  at(event) {
    const box = this.canvas.getBoundingClientRect()
    return [((event.clientX - box.left) * WIDTH) / box.width, ((event.clientY - box.top) * HEIGHT) / box.height]
  }

  grab(event) {
    const keys = this.keys
    if (event.button !== 0 || !keys || this.node.inputs?.some((input) => input.widget?.name === "keyframes" && input.link != null)) return
    event.stopPropagation()
    const range = this.range(keys)
    const [x, y] = this.at(event)
    const distances = keys.map((key) => Math.hypot(...this.place(key, range).map((value, axis) => value - [x, y][axis])))
    const nearest = distances.indexOf(Math.min(...distances))
    if (distances[nearest] > GRAB) return
    this.canvas.setPointerCapture(event.pointerId)
    this.held = { keys, index: nearest, range }
  }

  drag(event) {
    if (!this.held || !this.canvas.hasPointerCapture(event.pointerId)) return
    const { keys, index, range } = this.held
    const [x, y] = this.at(event)
    const first = index ? keys[index - 1].frame + 1 : 0 // keyframes keep their order
    const last = index + 1 < keys.length ? keys[index + 1].frame - 1 : Infinity
    const frame = Math.round((range.last * (x - MARGIN)) / (WIDTH - 2 * MARGIN))
    keys[index].frame = Math.min(last, Math.max(first, frame))
    if (!keys[index].point) {
      const share = Math.min(1, Math.max(0, (HEIGHT - MARGIN - y) / (HEIGHT - 2 * MARGIN)))
      keys[index].value = range.low + share * (range.high - range.low)
    }
    const text = written(keys)
    this.widget.value = text
    this.widget.callback?.(text, app.canvas, this.node)
    this.draw()
  }

  draw() {
    const context = this.canvas.getContext("2d")
    context.clearRect(0, 0, WIDTH, HEIGHT)
    const keys = this.held?.keys ?? this.keys
    if (!keys) return
    const range = this.held?.range ?? this.range(keys)
    context.lineWidth = 2
    context.strokeStyle = "#7fb2ff"
    for (let i = 0; i + 1 < keys.length; i++) {
      const [from, to] = [this.place(keys[i], range), this.place(keys[i + 1], range)]
      const exact = !keys[i].point && !keys[i + 1].point // depth at a point is known only when it runs
      const easing = EASINGS[keys[i + 1].easing] ?? EASINGS.linear
      context.setLineDash(exact ? [] : [4, 5])
      context.beginPath()
      context.moveTo(...from)
      for (let step = 1; step <= 32; step++) {
        const t = step / 32
        context.lineTo(from[0] + (to[0] - from[0]) * t, from[1] + (to[1] - from[1]) * easing(t))
      }
      context.lineTo(...to)
      context.stroke()
    }
    context.setLineDash([])
    context.font = "20px sans-serif"
    context.textAlign = "center"
    keys.forEach((key, index) => {
      const [x, y] = this.place(key, range)
      context.fillStyle = this.held?.index === index ? "#ffffff" : key.point ? "#ffb347" : "#7fb2ff"
      context.beginPath()
      if (key.point) context.rect(x - 5, y - 5, 10, 10)
      else context.arc(x, y, 6, 0, 2 * Math.PI)
      context.fill()
      context.fillStyle = "#cccccc"
      context.fillText(key.frame, x, HEIGHT - 4)
      context.fillText(key.point ? `(${key.point.join(", ")})` : key.value.toFixed(2), Math.min(WIDTH - 40, Math.max(40, x)), y - 12)
    })
  }
}

app.registerExtension({
  name: "bokeh.focus_track",
  nodeCreated(node) {
    if (node.comfyClass !== "BokehFocusTrack") return
    const track = new Track(node)
    // Neither part of the prompt nor of the saved workflow, so that widget values keep their places.
    const widget = node.addDOMWidget("track", "bokeh_focus_track", track.canvas, { serialize: false, getMinHeight: () => 110 })
    widget.serialize = false
    node.setSize([Math.max(node.size[0], 320), Math.max(node.size[1], 280)])
    const text = track.widget
    const callback = text.callback
    text.callback = function () {
      const result = callback?.apply(this, arguments)
      if (!track.held) track.draw()
      return result
    }
    text.element?.addEventListener?.("input", () => track.draw())
    text.inputEl?.addEventListener?.("input", () => track.draw())
    track.canvas.addEventListener("pointerenter", () => track.draw())
    setTimeout(() => track.draw(), 300) // once the saved text is in place
  },
})
