// Hides the advanced inputs of this pack's nodes in the classic page too, which else shows all of them: "Show Advanced"
// in the node's menu brings them back. Nothing is reordered, so saved workflows keep their values.
import { app } from "../../../scripts/app.js";

function hide(node, widget) {
  widget.advanced = true;
  // `advanced` alone leaves their room empty. The new nodes have a switch of their own.
  const hidden = () => !node.showAdvanced && !window.LiteGraph?.vueNodesMode;
  Object.defineProperty(widget, "hidden", { get: hidden, set() {}, configurable: true });
}

app.registerExtension({
  name: "tadsr.advanced",
  nodeCreated(node) {
    const data = node.constructor.nodeData;
    if (!node.comfyClass?.startsWith("TADSR") || !data) return;
    const inputs = { ...data.input?.required, ...data.input?.optional };
    let advanced = false;
    for (const widget of node.widgets ?? []) {
      // A widget that is no input, "control after generate", belongs to the input before it.
      if (widget.name in inputs) advanced = !!inputs[widget.name][1]?.advanced;
      if (advanced) hide(node, widget);
    }
    node.setSize?.(node.computeSize());
  },
});
