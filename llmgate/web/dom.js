/**
 * Elements made by calls. Nothing in the console writes HTML: text is text, whoever wrote it.
 */

const SVG = "http://www.w3.org/2000/svg";

/**
 * An element. Of `props`, functions whose name begins with "on" listen, `class` and data-, aria- and other attributes
 * are set (true: without a value; false, null and undefined: not at all), and `value`, `checked` and the like are
 * properties.
 * @param {string} tag
 * @param {Record<string, unknown> | null} [props]
 * @param {...unknown} children nodes, texts, lists of these; null, undefined and false are left out
 * @returns {HTMLElement & any}
 */
export function h(tag, props, ...children) {
  return filled(document.createElement(tag), props, children);
}

/** The same for SVG. @returns {SVGElement & any} */
export function s(tag, props, ...children) {
  return filled(document.createElementNS(SVG, tag), props, children);
}

const PROPERTIES = new Set(["value", "checked", "selected", "indeterminate"]);

function filled(element, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (PROPERTIES.has(name)) element[name] = value;
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value === true ? "" : value);
  }
  add(element, children);
  return element;
}

/** Append nodes, texts and lists of these. */
export function add(element, children) {
  for (const child of [children].flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : String(child));
  }
}

/** Put these in place of all that an element holds. */
export function fill(element, ...children) {
  element.replaceChildren();
  add(element, children);
  return element;
}

/** Change a text only where it differs, so that a selection and a screen reader are left in peace. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Set or take away an attribute. */
export function mark(element, name, value) {
  if (value === null || value === undefined || value === false) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value === true ? "" : value);
}

/**
 * Keep one element an entry, in order: what is known is updated, what is new is made, what is gone is removed. Focus
 * and selections stay where they are.
 * @param {Element} parent
 * @param {Map<string, {element: Element, update: (entry: any) => void}>} known
 * @param {any[]} entries
 * @param {(entry: any) => string} name
 * @param {(entry: any) => {element: Element, update: (entry: any) => void}} make
 * @param {Element | null} [after] behind which they stand, as behind a table's head
 */
export function keep(parent, known, entries, name, make, after = null) {
  const wanted = new Set(entries.map(name));
  for (const [id, part] of known) {
    if (!wanted.has(id)) {
      part.element.remove();
      known.delete(id);
    }
  }
  let before = after;
  for (const entry of entries) {
    const id = name(entry);
    let part = known.get(id);
    if (!part) known.set(id, (part = make(entry)));
    part.update(entry);
    const place = before ? before.nextSibling : parent.firstChild;
    if (part.element !== place) parent.insertBefore(part.element, place);
    before = part.element;
  }
}

let fields = 0;

/**
 * A labelled field. `props.id` is made if it is missing.
 * @returns {{element: HTMLElement, input: any, wrong: (message: string) => void}}
 */
export function field(label, input, hint) {
  input.id ||= `field-${++fields}`;
  const wrong = h("div", { class: "wrong", id: `${input.id}-wrong`, hidden: true });
  const help = hint ? h("div", { class: "hint", id: `${input.id}-hint` }, hint) : null;
  input.setAttribute("aria-describedby", `${help ? `${help.id} ` : ""}${wrong.id}`);
  const element = h("div", { class: "field" }, h("label", { for: input.id }, label), input, help, wrong);
  return {
    element,
    input,
    wrong(message) {
      mark(input, "aria-invalid", message ? "true" : null);
      say(wrong, message);
      wrong.hidden = !message;
    },
  };
}

/**
 * A modal dialog that is gone when it is closed. @param {string} title
 * @param {(close: () => void) => HTMLElement} content
 * @returns {HTMLDialogElement}
 */
export function dialog(title, content) {
  const opener = document.activeElement;
  const head = h("h2", { id: `dialog-${++fields}` }, title);
  const box = h("dialog", { "aria-labelledby": head.id, onclose: () => {
    box.remove();
    if (opener instanceof HTMLElement && opener.isConnected) opener.focus();
  } });
  const inside = content(() => box.close());
  inside.prepend(head);
  box.append(inside);
  box.addEventListener("mousedown", (event) => {
    if (event.target === box) box.close();
  });
  document.body.append(box);
  box.showModal();
  return box;
}

/** An icon of 16 by 16, in strokes. */
export function icon(name) {
  return s("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" }, ICONS[name].map((d) => s("path", { d })));
}

const ICONS = {
  sun: ["M8 5a3 3 0 1 1 0 6a3 3 0 1 1 0-6", "M8 1.5v1M8 13.5v1M1.5 8h1M13.5 8h1M3.4 3.4l.7.7M11.9 11.9l.7.7M12.6 3.4l-.7.7M4.1 11.9l-.7.7"],
  moon: ["M13.5 9.6A6 6 0 0 1 6.4 2.5a6 6 0 1 0 7.1 7.1z"],
  auto: ["M8 2a6 6 0 1 1 0 12a6 6 0 1 1 0-12", "M8 2v12M10 4v8M12 5.5v5"],
  help: ["M8 1.8a6.2 6.2 0 1 1 0 12.4a6.2 6.2 0 1 1 0-12.4", "M6.2 6.2a1.8 1.8 0 1 1 2.6 1.6c-.6.3-.8.6-.8 1.3M8 11.3v.1"],
  leave: ["M6.5 2.5H3.5v11h3M9.5 5l3 3-3 3M12.5 8H6.5"],
  send: ["M8 13V3M3.8 7.2L8 3l4.2 4.2"],
  stop: ["M4.5 4.5h7v7h-7z"],
  copy: ["M5.5 5.5h7v8h-7zM10.5 5.5v-3h-7v8h2"],
  edit: ["M3 13l.6-2.8L11 2.8l2.2 2.2-7.4 7.4z"],
  again: ["M13 8a5 5 0 1 1-1.6-3.7M13 2.5v3h-3"],
  close: ["M4 4l8 8M12 4l-8 8"],
};
