// Draws the masks that Python has computed; it decides nothing about them (stm/report/viewer/encode.py has the format).
"use strict";

const HIDDEN = "rgb(140, 140, 140)"; // the grey of the still images
const BOX = "rgb(240, 228, 66)";
const PLAY_MILLISECONDS = 200;
const CANVAS_SIDE = 448; // pixels, at least

const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const isHidden = (mask, token) => (mask[token >> 3] >> (7 - (token & 7))) & 1;
const percent = (share, digits) => `${(100 * share).toFixed(digits)} %`;

function makeOption(value, text) {
  const option = document.createElement("option");
  option.value = value;
  option.textContent = text;
  return option;
}

function startViewer(root, number) {
  const data = JSON.parse(root.querySelector("script").textContent);
  const part = (name) => root.querySelector(`[data-part="${name}"]`);
  const row = (name) => root.querySelector(`[data-row="${name}"]`);
  const tokens = data.side * data.side;
  const cell = Math.ceil(CANVAS_SIDE / data.side); // whole pixels, so that the grid is sharp
  const canvas = part("canvas");
  canvas.width = canvas.height = cell * data.side;
  const context = canvas.getContext("2d");
  let images = [];
  let timer = 0;

  const clip = () => data.clips[part("clip").value];
  const strategy = () => {
    const choice = data.strategies.filter((one) => one.choice === part("choice").value);
    const switched = part("switch").querySelector("input:checked");
    return choice.find((one) => switched && one.name === switched.value) || choice[0];
  };
  const captionNumber = () => Number(part("caption").value) || 0;
  const masks = () => clip().masks[strategy().name][strategy().perCaption ? captionNumber() : 0];

  function drawToken(token, style, opacity) {
    context.globalAlpha = opacity;
    context.fillStyle = style;
    context.fillRect((token % data.side) * cell, Math.floor(token / data.side) * cell, cell, cell);
    context.globalAlpha = 1;
  }

  function drawGrid() {
    context.strokeStyle = "rgba(255, 255, 255, 0.3)";
    context.lineWidth = 1;
    context.beginPath();
    for (let line = cell; line < canvas.width; line += cell) {
      context.moveTo(line + 0.5, 0);
      context.lineTo(line + 0.5, canvas.height);
      context.moveTo(0, line + 0.5);
      context.lineTo(canvas.width, line + 0.5);
    }
    context.stroke();
  }

  function drawBox(box) {
    const [x0, y0, x1, y1] = box.map((edge) => edge * canvas.width);
    for (const [color, width] of [["black", 5], [BOX, 3]]) {
      context.strokeStyle = color;
      context.lineWidth = width;
      context.strokeRect(x0, y0, x1 - x0, y1 - y0);
    }
  }

  function draw() {
    const frame = Number(part("frame").value);
    const first = Math.floor(frame / data.tubelet) * tokens; // the first token of the frame's slot
    const mask = bytes(masks()[part("ratio").value].bits);
    const maps = clip().maps[part("map").value];
    const map = maps && bytes(maps[Math.min(captionNumber(), maps.length - 1)]);
    context.drawImage(images[frame], 0, 0, canvas.width, canvas.height);
    for (let token = 0; token < tokens; token++) {
      if (map) drawToken(token, data.colors[map[first + token]], 0.6);
      if (isHidden(mask, first + token)) drawToken(token, HIDDEN, part("faint").checked ? 0.7 : 1);
    }
    drawGrid();
    const box = clip().boxes && clip().boxes[frame];
    if (box) drawBox(box);
  }

  function describe() {
    const chosen = strategy();
    const ratio = part("ratio");
    const value = chosen.ratios[ratio.value].toFixed(2);
    const usual = chosen.ratios[chosen.usual].toFixed(2);
    const shown = value === usual ? `${value} (usual)` : `${value} (usual: ${usual})`;
    part("ratio-value").textContent = shown;
    ratio.setAttribute("aria-valuetext", shown);
    const { bits, box } = masks()[ratio.value];
    const mask = bytes(bits);
    const total = data.slots * tokens;
    let hidden = 0;
    for (let token = 0; token < total; token++) hidden += isHidden(mask, token);
    const boxes = box === null ? "" : ` and ${percent(box, 0)} of the box`;
    part("says").textContent =
      `${chosen.name} at ${value} hides ${percent(hidden / total, 1)} of the tokens (${hidden} of ${total})${boxes}.`;
  }

  function showFrame() {
    const frame = Number(part("frame").value);
    const shown = `${frame + 1} of ${images.length}`;
    part("frame-number").textContent = shown;
    part("frame").setAttribute("aria-valuetext", shown);
    if (images[frame].complete) draw();
    else images[frame].onload = draw; // even data URLs are loaded in the background
  }

  function update() {
    row("caption").hidden = !(strategy().perCaption || part("map").value === "similarity");
    describe();
    showFrame();
  }

  function chooseRatio(value) {
    const distances = strategy().ratios.map((ratio) => Math.abs(ratio - value));
    part("ratio").max = distances.length - 1;
    part("ratio").value = distances.indexOf(Math.min(...distances));
  }

  function chooseStrategy(ratio) {
    const sides = data.strategies.filter((one) => one.choice === part("choice").value && one.switch);
    row("switch").hidden = sides.length < 2;
    part("switch").replaceChildren(...sides.map((one, place) => {
      const label = document.createElement("label");
      const input = document.createElement("input");
      Object.assign(input, { type: "radio", name: `viewer-${number}-switch`, value: one.name, checked: place === 0 });
      label.append(input, one.switch);
      return label;
    }));
    chooseRatio(ratio);
    update();
  }

  function chooseClip() {
    images = clip().frames.map((frame) => Object.assign(new Image(), { src: `data:image/jpeg;base64,${frame}` }));
    part("frame").max = images.length - 1;
    part("caption").replaceChildren(...clip().captions.map((caption, place) => makeOption(place, caption)));
    const known = part("map").value;
    const maps = Object.keys(clip().maps).map((name) => makeOption(name, data.mapTitles[name]));
    part("map").replaceChildren(makeOption("", "none"), ...maps);
    part("map").value = known in clip().maps ? known : "";
    row("map").hidden = maps.length === 0;
    update();
  }

  function togglePlay() {
    if (timer) {
      clearInterval(timer);
      timer = 0;
    } else {
      timer = setInterval(() => {
        part("frame").value = (Number(part("frame").value) + 1) % images.length;
        showFrame();
      }, PLAY_MILLISECONDS);
    }
    part("play").textContent = timer ? "Pause" : "Play";
  }

  part("clip").replaceChildren(...data.clips.map((one, place) => makeOption(place, one.name)));
  row("clip").hidden = data.clips.length < 2;
  const choices = [...new Set(data.strategies.map((one) => one.choice))];
  part("choice").replaceChildren(...choices.map((choice) => makeOption(choice, choice)));
  // The ratio stays when the strategy changes, so that strategies are compared at the same ratio.
  part("choice").addEventListener("change", () => chooseStrategy(shownRatio));
  const start = data.strategies.find((one) => one.name === data.start);
  let shownRatio = start.ratios[start.usual];
  part("choice").value = start.choice;
  part("ratio").addEventListener("input", () => {
    shownRatio = strategy().ratios[part("ratio").value];
    update();
  });
  part("clip").addEventListener("change", chooseClip);
  for (const name of ["switch", "caption", "map", "faint"]) part(name).addEventListener("change", update);
  part("frame").addEventListener("input", showFrame);
  part("play").addEventListener("click", togglePlay);
  chooseRatio(shownRatio);
  chooseClip();
  chooseStrategy(shownRatio);
  root.hidden = false;
}

document.querySelectorAll(".viewer").forEach(startViewer);
