// Text of a model as text: each part becomes a text node in a span of its kind. No markup of the text is ever read.
export default {
  props: { parts: Array },
  render() {
    const spans = (this.parts ?? []).map(([kind, text]) => (kind === "same" ? text : Vue.h("span", { class: kind }, text)));
    return Vue.h("pre", { class: "words", dir: "auto" }, spans);
  },
};
