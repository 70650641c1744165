// Shows every slice of the volumes that viewer.py packed into a page.
"use strict";

const LEVELS = 256;
const IN_PLANE = [[1, 2], [0, 2], [0, 1]]; // the axes to the right and upwards in each plane, as in pictures.py
const KEYS = {ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowUp: [1, 1], ArrowDown: [1, -1], PageUp: [2, 1], PageDown: [2, -1]};

async function unpack(text, [nx, ny]) {
  const bytes = Uint8Array.from(atob(text), character => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const levels = new Uint8Array(await new Response(stream).arrayBuffer());
  for (let i = 0; i < levels.length; i++) if (i % nx) levels[i] += levels[i - 1]; // modulo 256
  for (let i = 0; i < levels.length; i++) if (Math.floor(i / nx) % ny) levels[i] += levels[i - nx];
  return levels;
}

class Viewer {
  constructor(element, about, volumes) {
    const [form, told] = ["form", ".told"].map(selector => element.querySelector(selector));
    Object.assign(this, {element, about, volumes, form, told});
    this.strides = [1, about.shape[0], about.shape[0] * about.shape[1]];
    this.centres = about.planes.map(() => null); // of each plane: the voxel that stays in place when the picture is enlarged
    this.panels = this.makePanels();
    this.form.addEventListener("input", () => this.draw());
    this.form.addEventListener("reset", () => setTimeout(() => this.draw())); // after the values have changed
    this.form.hidden = this.told.hidden = false;
    this.draw();
  }

  makePanels() {
    const grid = this.element.querySelector(".panels");
    const titles = this.about.titles.map(title => Object.assign(document.createElement("span"), {textContent: title}));
    grid.replaceChildren(...titles);
    grid.style.gridTemplateColumns = `repeat(${titles.length}, 1fr)`;
    return this.about.planes.flatMap((name, plane) => this.about.titles.map((title, column) => {
      const [width, height] = this.about.extents[name];
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = IN_PLANE[plane].map(axis => this.about.shape[axis]);
      canvas.tabIndex = column ? -1 : 0; // one stop of the tabulator key for a plane
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `${name}, ${title}`);
      const frame = Object.assign(document.createElement("div"), {className: "plane"});
      frame.style.cssText = `width: min(100%, calc(22rem * ${width} / ${height})); aspect-ratio: ${width} / ${height}`;
      frame.append(canvas);
      const panel = Object.assign(document.createElement("div"), {className: "panel"});
      panel.append(frame);
      grid.append(panel);
      this.listen(canvas, plane);
      return {plane, column, canvas, frame};
    }));
  }

  listen(canvas, plane) {
    const goTo = event => this.moveTo(this.voxelAt(event, canvas, plane), plane);
    canvas.addEventListener("pointerdown", event => {
      canvas.setPointerCapture(event.pointerId);
      goTo(event);
    });
    canvas.addEventListener("pointermove", event => {
      if (event.buttons) goTo(event);
      else this.tell(this.voxelAt(event, canvas, plane));
    });
    canvas.addEventListener("pointerleave", () => this.tell(this.position));
    canvas.addEventListener("wheel", event => {
      if (!this.element.contains(document.activeElement)) return; // the page scrolls until the viewer was clicked
      event.preventDefault();
      this.moveBy(plane, -Math.sign(event.deltaY));
    }, {passive: false});
    canvas.addEventListener("keydown", event => {
      if (!(event.key in KEYS)) return;
      event.preventDefault();
      const [axis, step] = KEYS[event.key];
      this.moveBy([...IN_PLANE[plane], plane][axis], step);
    });
  }

  // Indices are those of the whole volume, of which `start` is the first voxel that is here. The sliders hold the position.
  get position() {
    return this.about.planes.map(name => this.form[name].valueAsNumber);
  }

  moveTo(position, kept) {
    this.about.planes.forEach((name, axis) => { this.form[name].value = position[axis]; }); // sliders keep to their range
    this.draw(kept);
  }

  moveBy(axis, step) {
    this.moveTo(this.position.map((index, other) => index + (other === axis ? step : 0)));
  }

  voxelAt(event, canvas, plane) {
    const box = canvas.getBoundingClientRect();
    const shares = [(event.clientX - box.left) / box.width, (box.bottom - event.clientY) / box.height];
    const position = this.position;
    IN_PLANE[plane].forEach((axis, side) => {
      const index = Math.min(Math.max(Math.floor(shares[side] * this.about.shape[axis]), 0), this.about.shape[axis] - 1);
      position[axis] = this.about.start[axis] + index;
    });
    return position;
  }

  offset(position) {
    return position.reduce((sum, index, axis) => sum + (index - this.about.start[axis]) * this.strides[axis], 0);
  }

  draw(kept) {
    const [level, width, gain] = ["level", "width", "gain"].map(name => this.form[name]?.valueAsNumber);
    const {low, step} = this.about;
    const tables = [
      greys(i => (low + i * step - level) / width + 0.5),
      greys(i => gain * i / (LEVELS - 1)),
    ];
    const position = this.position;
    for (const {plane, column, canvas, frame} of this.panels) {
      this.paint(canvas, plane, column, tables, position);
      if (plane !== kept || !this.centres[plane]) this.centres[plane] = position;
      this.place(canvas, frame, plane, position);
    }
    for (const label of this.form.querySelectorAll("label:has(output)")) {
      const input = label.querySelector("input");
      label.querySelector("output").textContent = Number(input.valueAsNumber.toPrecision(4));
    }
    this.tell(position);
  }

  paint(canvas, plane, column, tables, position) {
    const [right, up] = IN_PLANE[plane].map(axis => this.strides[axis]);
    const [first, second] = this.volumes;
    const {width, height} = canvas;
    const picture = new ImageData(width, height);
    const pixels = new Uint32Array(picture.data.buffer);
    const corner = (position[plane] - this.about.start[plane]) * this.strides[plane];
    const shown = column === 2 ? i => tables[1][Math.abs(second[i] - first[i])] : i => tables[0][this.volumes[column][i]];
    for (let y = 0, pixel = 0; y < height; y++) {
      let i = corner + (height - 1 - y) * up;
      for (let x = 0; x < width; x++, i += right) pixels[pixel++] = shown(i);
    }
    canvas.getContext("2d").putImageData(picture, 0, 0);
  }

  // Enlarges the picture around its centre, and moves the lines through the position.
  place(canvas, frame, plane, position) {
    const zoom = this.form.zoom.valueAsNumber;
    const shares = voxel => IN_PLANE[plane].map((axis, side) => {
      const share = (voxel[axis] - this.about.start[axis] + 0.5) / this.about.shape[axis];
      return 100 * (side ? 1 - share : share);
    });
    const centre = shares(this.centres[plane]);
    canvas.style.transformOrigin = centre.map(share => `${share}%`).join(" ");
    canvas.style.transform = `scale(${zoom})`;
    shares(position).forEach((share, side) => {
      frame.style.setProperty(side ? "--y" : "--x", `${centre[side] + zoom * (share - centre[side])}%`);
    });
    frame.classList.toggle("crossed", this.form.crosshair.checked);
  }

  // What is at a voxel, in the units of the file.
  tell(position) {
    const {affine, low, step, titles} = this.about;
    const digits = Math.max(0, 1 - Math.floor(Math.log10(step))); // of which the last is below the step
    const levels = this.volumes.map(volume => volume[this.offset(position)]);
    const values = levels.map(level => low + level * step);
    if (values.length > 1) values.push((levels[1] - levels[0]) * step);
    const place = affine.slice(0, 3).map(row => row[0] * position[0] + row[1] * position[1] + row[2] * position[2] + row[3]);
    this.told.textContent = [
      `voxel ${position.join(", ")} (RAS)`,
      `${place.map(value => value.toFixed(1)).join(", ")} mm`,
      ...titles.map((title, column) => `${title} ${values[column].toFixed(digits)}`),
    ].join(" · ");
  }
}

// The colour of each level, or of each difference of levels, as a pixel: opaque grey.
function greys(brightness) {
  return Uint32Array.from({length: LEVELS}, (_, i) => {
    const grey = Math.round(255 * Math.min(Math.max(brightness(i), 0), 1));
    return 0xff000000 + grey * 0x010101;
  });
}

for (const element of document.querySelectorAll(".viewer")) {
  const button = element.querySelector("button");
  button.hidden = !("DecompressionStream" in window);
  button.addEventListener("click", async () => {
    button.disabled = true;
    const about = JSON.parse(element.dataset.about);
    const texts = [...element.querySelectorAll("script")];
    const volumes = await Promise.all(texts.map(script => unpack(script.textContent, about.shape)));
    texts.forEach(script => script.remove()); // their memory
    button.remove();
    new Viewer(element, about, volumes).panels[0].canvas.focus({preventScroll: true});
  });
}
