// Text of messages as DOM. What a model says is never trusted: Markdown becomes HTML, the sanitiser keeps a short list of tags.

const TAGS = ["a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "strong",
  "table", "tbody", "td", "th", "thead", "tr", "ul"];
const RULES = { ALLOWED_TAGS: TAGS, ALLOWED_ATTR: ["href", "start"], ALLOWED_URI_REGEXP: /^(https?:|mailto:)/i, RETURN_DOM_FRAGMENT: true };

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName === "A") {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer");
  }
});

const escape = (text) => text.replace(/[&<>"']/g, (letter) => `&#${letter.charCodeAt(0)};`);
marked.use({ gfm: true, breaks: true, renderer: { html: ({ text }) => escape(text) } }); // HTML is shown, not obeyed

export const clean = (html) => DOMPurify.sanitize(html, RULES);

export function markdown(text) {
  return clean(marked.parse(text));
}

// Tokens with a background that grows with the root of their uncertainty (standard deviation of the token's probability).
export function tinted(pieces) {
  const box = document.createElement("div");
  box.className = "tinted";
  for (const [text, uncertainty] of pieces) {
    const span = document.createElement("span");
    span.textContent = text;
    if (uncertainty !== null) {
      span.style.backgroundColor = `rgb(230 120 30 / ${Math.min(0.75, 1.2 * Math.sqrt(uncertainty)).toFixed(3)})`;
      span.title = `±${uncertainty}`;
    }
    box.append(span);
  }
  return box;
}

export function button(name, action) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = name;
  made.addEventListener("click", action);
  return made;
}

export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea"); // outside of a secure context there is no clipboard object
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

export function download(content, name, type) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
