// From the keys that tokens attended to, to the characters of a document.

const SINKS = 16;
const RECENT = 128;

// A document within a prompt: where its tokens stand in it, and its sentences.
export class Place {
  // `text` is the prompt, `offsets` are its tokens' places in it, in code points.
  constructor(document, text, offsets) {
    const start = text.indexOf(document);
    const units = /[\ud800-\udfff]/.test(text) ? unitsOf(text) : null;
    const unit = (at) => (units ? units[at] : at) - start;
    this.document = document;
    this.offsets = offsets.map(([from, to]) => [unit(from), unit(to)]);
    this.sentences = sentences(document);
  }

  // Of a token its characters in the document; null where it is not of it.
  characters(position) {
    const [from, to] = this.offsets[position] ?? [0, 0];
    return to > 0 && from < this.document.length && to > from ? [Math.max(0, from), Math.min(to, this.document.length)] : null;
  }

  sentence(character) {
    let low = 0, high = this.sentences.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.sentences[middle][0] <= character) low = middle;
      else high = middle - 1;
    }
    return low;
  }
}

// For each code point where it begins in UTF-16, which is what strings here are made of.
function unitsOf(text) {
  const units = [];
  let at = 0;
  for (const letter of text) {
    units.push(at);
    at += letter.length;
  }
  return [...units, at];
}

function sentences(text) {
  const found = [];
  for (const match of text.matchAll(/[^.!?\n]*(?:[.!?]+["\u201d')]*|\n+|$)\s*/g)) {
    if (match[0]) found.push([match.index, match.index + match[0].length]);
  }
  return found.length ? found : [[0, text.length]];
}

// The weight of each key, mean over some tokens' looks and over the heads chosen, and their figures.
export function massOf(looks, { layer, head, hide }) {
  const mass = new Map();
  let heads = 0, keys = 0, visible = 0, coverage = 0;
  for (const look of looks) {
    for (const one of look.heads) {
      if ((layer !== null && one.layer !== layer) || (head !== null && one.head !== head)) continue;
      heads += 1;
      keys += one.keys;
      visible += look.visible;
      coverage += one.coverage;
      one.positions.forEach((position, at) => {
        if (hide && (position < SINKS || position >= look.visible - RECENT)) return;
        mass.set(position, (mass.get(position) ?? 0) + one.weights[at]);
      });
    }
  }
  for (const [position, sum] of mass) mass.set(position, sum / heads);
  return { mass, density: visible ? keys / visible : 0, coverage: heads ? coverage / heads : 0, keys: heads ? keys / heads : 0 };
}
