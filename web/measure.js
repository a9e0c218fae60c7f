// Shows the table of scores on the node Measure Against Truth.
import { app } from "../../scripts/app.js"

const tables = new WeakMap()

function show(node, output) {
  if (!tables.has(node) || !output?.text) return
  const rows = output.text[0].split("\n").filter((row) => !row.startsWith("| ---"))
  tables.get(node).replaceChildren(
    ...rows.map((row) => {
      const line = document.createElement("tr")
      for (const cell of row.split("|").slice(1, -1)) line.insertCell().textContent = cell.trim()
      return line
    })
  )
}

app.registerExtension({
  name: "bokeh.measure",
  nodeCreated(node) {
    if (node.comfyClass !== "BokehMeasure") return
    const frame = document.createElement("div")
    const table = document.createElement("table")
    table.className = "bokeh-scores"
    table.style.cssText = "width: 100%; font-size: 12px; user-select: text"
    frame.append(table)
    tables.set(node, table)
    // Neither part of the prompt nor of the saved workflow, so that widget values keep their places.
    const widget = node.addDOMWidget("scores", "bokeh_scores", frame, { serialize: false, getMinHeight: () => 140 })
    widget.serialize = false
    node.setSize([Math.max(node.size[0], 300), Math.max(node.size[1], 320)])
    const executed = node.onExecuted
    node.onExecuted = function (output) {
      executed?.apply(this, arguments)
      show(this, output)
    }
  },
  // After a reload or a change of tabs the front end hands out what it remembers.
  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs)) {
      const node = app.graph.getNodeById(id)
      if (node) show(node, output)
    }
  },
})
