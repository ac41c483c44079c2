// Pictures that are about to be sent: chosen, pasted or dropped; read into data URLs, with no upload of their own.

import { button, h } from "./dom.js";

const TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif"];
const MOST = 8;
const MOST_BYTES = 5 * 1024 * 1024; // the gateway's own default, `images.max_image_bytes`

export class Images {
  #pictures = []; // {name, url}

  // `complain` is called with what was wrong with a file, or with null.
  constructor(list, complain) {
    this.list = list;
    this.complain = complain;
    this.#draw();
  }

  get urls() {
    return this.#pictures.map((picture) => picture.url);
  }

  async add(files) {
    this.complain(null);
    for (const file of files) {
      if (!TYPES.includes(file.type)) this.complain(`${file.name} is not a PNG, JPEG, WebP or GIF picture.`);
      else if (file.size > MOST_BYTES) this.complain(`${file.name} is larger than 5 MiB.`);
      else if (this.#pictures.length >= MOST) this.complain(`A message takes ${MOST} pictures at most.`);
      else this.#pictures.push({ name: file.name, url: await dataUrl(file) });
    }
    this.#draw();
  }

  clear() {
    this.#pictures = [];
    this.#draw();
  }

  #draw() {
    this.list.hidden = this.#pictures.length === 0;
    this.list.replaceChildren(...this.#pictures.map((picture) => h("li", {},
      h("img", { src: picture.url, alt: picture.name }),
      button(`Remove ${picture.name}`, { glyph: "close", onlyIcon: true, kind: "quiet", onclick: () => {
        this.#pictures = this.#pictures.filter((other) => other !== picture);
        this.#draw();
      } }))));
  }
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
