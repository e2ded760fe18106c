// Live heat maps: one row per layer and head (or projection), one column per look at the synapses of this request.

const WIDTH = 96; // columns before the picture scrolls
const QUANTITIES = [
  ["calcium", "Calcium", "terminals, mean"],
  ["vesicles", "Vesicle pool", "fraction of full"],
  ["energy", "Energy", "fraction of full"],
  ["fast", "Fast-weight norm", "Frobenius"],
];

const show = (value) => (value === 0 ? "0" : Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(3));

// From deep blue through green to yellow: lightness grows with the value, so it also reads without colour.
function colour(share) {
  return `hsl(${260 - 205 * share} 65% ${18 + 52 * share}%)`;
}

function column(look, quantity) {
  return look.flatMap((layer) => (quantity === "fast" ? Object.values(layer.fast ?? {}) : (layer[quantity] ?? [])));
}

export class Vitals {
  constructor(place) {
    this.place = place;
    this.clear();
  }

  clear() {
    this.looks = [];
    this.maps = new Map();
  }

  add(look) {
    if (this.looks.length === 0) this.build(look);
    this.looks.push(look);
    if (this.looks.length > WIDTH) this.looks.shift();
    this.draw();
  }

  build(look) {
    this.place.replaceChildren();
    this.maps.clear();
    for (const [quantity, name, unit] of QUANTITIES) {
      const rows = column(look, quantity).length;
      const box = document.createElement("div");
      box.className = "vital";
      const line = document.createElement("div");
      line.className = "name";
      const [left, right] = [document.createElement("span"), document.createElement("span")];
      left.textContent = name;
      right.className = "quiet";
      right.textContent = rows ? unit : "not in this model";
      line.append(left, right);
      box.append(line);
      if (rows) {
        const canvas = document.createElement("canvas");
        canvas.id = `vital-${quantity}`;
        canvas.setAttribute("role", "img");
        canvas.width = WIDTH;
        canvas.height = rows;
        canvas.style.height = `${Math.min(150, Math.max(28, rows * 9))}px`;
        box.append(canvas);
        this.maps.set(quantity, { canvas, right, name, unit });
      }
      this.place.append(box);
    }
  }

  draw() {
    for (const [quantity, { canvas, right, name, unit }] of this.maps) {
      const columns = this.looks.map((look) => column(look, quantity));
      const all = columns.flat();
      const [low, high] = [Math.min(...all), Math.max(...all)];
      const pen = canvas.getContext("2d");
      pen.clearRect(0, 0, canvas.width, canvas.height);
      columns.forEach((values, x) =>
        values.forEach((value, y) => {
          pen.fillStyle = colour(high > low ? (value - low) / (high - low) : 0.5);
          pen.fillRect(x, y, 1, 1);
        }),
      );
      const last = columns.at(-1);
      const mean = last.reduce((sum, value) => sum + value, 0) / last.length;
      right.textContent = `${show(mean)} now · ${show(low)}–${show(high)}`;
      canvas.title = `${name} (${unit}): a row per layer and head, from the first layer down; time runs to the right`;
      canvas.setAttribute("aria-label", `${name}: mean ${show(mean)}, from ${show(low)} to ${show(high)}`);
    }
  }
}
