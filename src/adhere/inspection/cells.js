// Numbers of a panel: attention unpacked (see packing.py), summed over the tokens of words.
const ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
const FLOOR = 1e-4;
const CODES = new Uint8Array(128);
[...ALPHABET].forEach((letter, code) => { CODES[letter.charCodeAt(0)] = code; });

function numbers(text, digits) {
  const found = new Uint16Array(text.length / digits);
  for (let cell = 0, at = 0; cell < found.length; cell++) {
    for (let digit = 0; digit < digits; digit++) found[cell] = found[cell] * 64 + CODES[text.charCodeAt(at++)];
  }
  return found;
}

// What each number stands for: 0, then FLOOR to 1, logarithmically.
function scaleOf(digits) {
  const top = 64 ** digits - 2;
  return Float32Array.from({ length: top + 2 }, (_, step) => (step ? FLOOR ** (1 - (step - 1) / top) : 0));
}

function unpack(text, digits) {
  const scale = scaleOf(digits), steps = numbers(text, digits), found = new Float32Array(steps.length);
  for (let cell = 0; cell < found.length; cell++) found[cell] = scale[steps[cell]]; // `from` with a function is slow
  return found;
}

function offsets(sizes) {
  const found = [0];
  for (const size of sizes) found.push(found[found.length - 1] + size);
  return found;
}

class Cells {
  constructor(data) {
    this.data = data;
    this.prompt = offsets(data.prompt);
    this.response = offsets(data.response);
    this.columns = this.prompt[this.prompt.length - 1];
    this.rows = this.response[this.response.length - 1];
    this.kept = new Map();
    this.places = data.heads && numbers(data.heads.places, 2);
    this.values = data.heads && unpack(data.heads.values, data.digits);
  }

  has(map) {
    return typeof map === "string" ? map in this.data.maps : Boolean(this.data.heads) && this.data.heads.kept.includes(map);
  }

  // [rows × columns] attention: of a map by its name, or of a head by its number.
  tokens(map) {
    if (!this.kept.has(map)) {
      if (typeof map === "number") {
        for (const other of this.kept.keys()) if (typeof other === "number") this.kept.delete(other); // one head at a time
      }
      const found = typeof map === "string" ? unpack(this.data.maps[map], this.data.digits) : this.headTokens(map);
      this.kept.set(map, { tokens: found, words: this.joined(found) });
    }
    return this.kept.get(map).tokens;
  }

  // [response words × prompt words]: the mean over the tokens of the one, the sum over those of the other.
  words(map) {
    this.tokens(map);
    return this.kept.get(map).words;
  }

  headTokens(head) {
    const found = new Float32Array(this.rows * this.columns);
    this.eachCell(head, (row, column, value) => { found[row * this.columns + column] = value; });
    return found;
  }

  eachCell(head, take) {
    const { kept, count } = this.data.heads;
    const start = kept.indexOf(head) * this.rows * count;
    for (let cell = 0; cell < this.rows * count; cell++) {
      const value = this.values[start + cell];
      if (value > 0) take(Math.floor(cell / count), this.places[start + cell], value);
    }
  }

  joined(tokens) {
    const wide = this.prompt.length - 1;
    const found = new Float32Array((this.response.length - 1) * wide);
    for (let said = 0; said + 1 < this.response.length; said++) {
      const size = this.response[said + 1] - this.response[said];
      for (let row = this.response[said]; row < this.response[said + 1]; row++) {
        for (let word = 0; word < wide; word++) {
          let sum = 0;
          for (let column = this.prompt[word]; column < this.prompt[word + 1]; column++) sum += tokens[row * this.columns + column];
          found[said * wide + word] += sum / size;
        }
      }
    }
    return found;
  }

  // Attention of one response word to every prompt word; of -1 the mean over all response tokens.
  row(map, said) {
    const all = this.words(map), wide = this.prompt.length - 1;
    if (said >= 0) return all.subarray(said * wide, (said + 1) * wide);
    const mean = new Float32Array(wide);
    for (let other = 0; other + 1 < this.response.length; other++) {
      const share = (this.response[other + 1] - this.response[other]) / this.rows;
      for (let word = 0; word < wide; word++) mean[word] += share * all[other * wide + word];
    }
    return mean;
  }

  // Attention of every response word to one prompt word.
  column(map, word) {
    const all = this.words(map), wide = this.prompt.length - 1;
    return Float32Array.from({ length: this.response.length - 1 }, (_, said) => all[said * wide + word]);
  }

  // A figure of a response word: the mean over its tokens.
  track(name, said) {
    const values = this.data.tracks[name].slice(this.response[said], this.response[said + 1]);
    return values.reduce((sum, value) => sum + value, 0) / values.length;
  }
}
