"use strict";
// The page of `polymodal serve`: chat, and two answers side by side. No text of a model or a file is ever read as HTML.

const STRINGS = {
  en: {
    chat: "Chat", compare: "Compare", runs: "Runs", views: "Views", language: "切换到中文",
    theme: "Light or dark", new_chat: "New chat", model: "Model", settings: "Settings", message: "Message", conversation: "Conversation",
    placeholder: "Ask something, or drop a file here", attach: "Attach files", attached: "Attached files", record: "Record a question",
    recording: "Stop recording", send: "Send", stop: "Stop", hint: "Enter sends, Shift+Enter starts a line, Esc stops",
    drop: "Drop images, sounds, videos or PDFs", remove: "Remove {0}", edit: "Edit and send again", again: "Answer again", copy: "Copy",
    copied: "Copied", saw: "What the model saw", you: "You", answer_of: "Answer of {0}", stopped: "Stopped.", thinking: "Reading",
    hello: "What would you like to ask?", hello_two: "One question, two answers",
    about: "This model takes text, {0}. This page talks to its server alone.", about_text: "This model takes text. This page talks to its server alone.",
    about_two: "The same conversation with two models, or with two settings of one.",
    image: "images", audio: "sounds", video: "videos", file: "PDFs", list: ", ", and: " and ",
    idea_image: "Describe this image.", idea_video: "What happens in this video?", idea_audio: "What is said here?",
    temperature: "Temperature", max_tokens: "Most tokens", system: "System prompt", own: "the model's own", answers_with: "Answers with",
    makes_image: "Images", makes_audio: "Speech", tokens_in: "{0} tokens in", of_image: "{0} image", of_audio: "{0} sound", cached: "{0} cached",
    tokens_out: "{0} out", first: "{0} s to first token", rate: "{0} tokens/s", seconds: "{0} s", media_tokens: "{0} {1}: {2} tokens", details: "Numbers",
    one_image: "Image", one_video: "Video", one_audio: "Sound", prompt_tokens: "{0} tokens in all, {1} of them media",
    drawn: "Image in the answer", key: "API key", key_title: "This server asks for a key",
    key_why: "It is kept in this tab alone and forgotten when the tab closes.", key_use: "Use this key", key_wrong: "The server does not know this key.",
    not_taken: "{0}: this model takes no {1}.", unknown: "{0} is no image, sound, video or PDF.", too_large: "{0} has more than {1} MiB.",
    too_many: "A conversation holds up to 8 files.", no_microphone: "The microphone cannot be used: {0}", no_server: "The server does not answer.",
    runs_title: "Training runs", no_runs: "No runs yet. They appear here as soon as training writes into the server's runs folder.",
    choose_run: "Choose a run to see its curves.", step: "Step", loss: "Loss", smoothed: "smoothed", held_out: "held-out", learning_rate: "Learning rate",
    grad_norm: "Gradient norm", speed: "Tokens per second", loss_kinds: "Loss by kind", ago: "{0} ago", samples: "Samples", time: "Time", curve: "{0}: from {1} to {2} over {3} steps",
    answers: "Answers to held-out questions", expected: "Expected", images_of: "Images of held-out data", at_step: "step {0}", live: "live",
  },
  zh: {
    chat: "对话", compare: "对比", runs: "训练", views: "视图", language: "Switch to English",
    theme: "浅色或深色", new_chat: "新对话", model: "模型", settings: "设置", message: "消息", conversation: "对话内容",
    placeholder: "输入问题,或把文件拖到这里", attach: "添加文件", attached: "已添加的文件", record: "录一段语音提问",
    recording: "停止录音", send: "发送", stop: "停止", hint: "Enter 发送,Shift+Enter 换行,Esc 停止",
    drop: "松开即可添加图片、声音、视频或 PDF", remove: "移除 {0}", edit: "编辑并重新发送", again: "重新回答", copy: "复制",
    copied: "已复制", saw: "模型看到了什么", you: "你", answer_of: "{0} 的回答", stopped: "已停止。", thinking: "正在读取",
    hello: "想问点什么?", hello_two: "一个问题,两个回答",
    about: "这个模型可以读文字、{0}。此页面只与自己的服务器通信。", about_text: "这个模型可以读文字。此页面只与自己的服务器通信。",
    about_two: "同一段对话,交给两个模型,或同一模型的两种设置。",
    image: "图片", audio: "声音", video: "视频", file: "PDF", list: "、", and: "和",
    idea_image: "描述这张图片。", idea_video: "视频里发生了什么?", idea_audio: "这段声音说了什么?",
    temperature: "温度", max_tokens: "最多词元数", system: "系统提示", own: "模型默认", answers_with: "回答包含",
    makes_image: "图片", makes_audio: "语音", tokens_in: "输入 {0} 词元", of_image: "图像 {0}", of_audio: "声音 {0}", cached: "缓存 {0}",
    tokens_out: "输出 {0}", first: "首词元 {0} 秒", rate: "{0} 词元/秒", seconds: "{0} 秒", media_tokens: "{0} {1}:{2} 词元", details: "数值",
    one_image: "图片", one_video: "视频", one_audio: "声音", prompt_tokens: "共 {0} 词元,其中媒体 {1}",
    drawn: "回答中的图片", key: "API 密钥", key_title: "此服务器需要密钥",
    key_why: "密钥只保存在这个标签页中,关闭后即清除。", key_use: "使用此密钥", key_wrong: "服务器不认识这个密钥。",
    not_taken: "{0}:这个模型不能读{1}。", unknown: "{0} 不是图片、声音、视频或 PDF。", too_large: "{0} 超过 {1} MiB。",
    too_many: "一段对话最多 8 个文件。", no_microphone: "无法使用麦克风:{0}", no_server: "服务器没有响应。",
    runs_title: "训练任务", no_runs: "还没有训练任务。训练写入服务器的 runs 文件夹后会显示在这里。",
    choose_run: "选择一个任务查看曲线。", step: "步数", loss: "损失", smoothed: "平滑", held_out: "留出集", learning_rate: "学习率",
    grad_norm: "梯度范数", speed: "每秒词元数", loss_kinds: "各类损失", ago: "{0}前", samples: "样本数", time: "用时", curve: "{0}:{3} 步内从 {1} 到 {2}",
    answers: "留出问题的回答", expected: "参考答案", images_of: "留出数据的图像", at_step: "第 {0} 步", live: "进行中",
  },
};
const KEY_PLACE = "polymodal-key", MAX_MEDIA = 8, MIB = 2 ** 20;
const $ = (id) => document.getElementById(id);
let language = localStorage.getItem("language") ?? (navigator.language.startsWith("zh") ? "zh" : "en");

function t(key, ...args) {
  return (STRINGS[language][key] ?? key).replace(/\{(\d)\}/g, (_, place) => args[place]);
}

function say(node, key, ...args) {
  node.dataset.t = key;
  node.dataset.args = JSON.stringify(args);
  node.textContent = t(key, ...args);
  return node;
}

function label(node, key, ...args) {
  node.dataset.tLabel = key;
  node.dataset.args = JSON.stringify(args);
  node.ariaLabel = t(key, ...args);
  if (node.tagName === "BUTTON" || node.tagName === "SUMMARY") node.title = node.ariaLabel;
  return node;
}

function translate(root = document) {
  document.documentElement.lang = language === "zh" ? "zh-Hans" : "en";
  const args = (node) => JSON.parse(node.dataset.args ?? "[]");
  for (const node of root.querySelectorAll("[data-t]")) say(node, node.dataset.t, ...args(node));
  for (const node of root.querySelectorAll("[data-t-label]")) label(node, node.dataset.tLabel, ...args(node));
  for (const node of root.querySelectorAll("[data-t-placeholder]")) node.placeholder = t(node.dataset.tPlaceholder);
}

function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === "t") say(node, ...[value].flat());
    else if (name === "label") label(node, ...[value].flat());
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("aria-hidden", "true");
  svg.appendChild(document.createElementNS(svg.namespaceURI, "use")).setAttribute("href", `#i-${name}`);
  return svg;
}

const button = (name, text, act) => el("button", { type: "button", className: `quiet icon ${name}`, label: text, onclick: act }, icon(name));
const number = (value, digits = 0) => value.toLocaleString(language, { maximumFractionDigits: digits });

function announce(text) {
  $("live").append(el("p", { textContent: text }));
  if ($("live").children.length > 40) $("live").firstChild.remove();
}

// The server. Its key, where it asks for one, lives in this tab's sessionStorage and nowhere else.
let asking = null;

function askKey() {
  return (asking ??= new Promise((done) => {
    $("key-wrong").hidden = sessionStorage.getItem(KEY_PLACE) === null;
    $("ask-key").showModal();
    $("ask-key").oncancel = (event) => event.preventDefault(); // nothing goes without it
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY_PLACE, $("key").value.trim());
      $("key").value = "";
      $("ask-key").close();
      asking = null;
      done();
    };
  }));
}

async function api(path, body = null, signal = null) {
  for (;;) {
    const key = sessionStorage.getItem(KEY_PLACE), headers = {};
    if (body) headers["Content-Type"] = "application/json";
    if (key && /^[\x21-\x7e]+$/.test(key)) headers.Authorization = `Bearer ${key}`;
    const options = body ? { method: "POST", body: JSON.stringify(body) } : {};
    const answer = await fetch(path, { ...options, headers, signal }).catch((error) => {
      throw error.name === "AbortError" ? error : new Error(t("no_server"));
    });
    if (answer.status === 401) await askKey();
    else if (answer.ok) return answer;
    else throw new Error(await answer.json().then((told) => told.error.message, () => `HTTP ${answer.status}`));
  }
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
  }
}

// Media: what is chosen, dropped, pasted or recorded, and what an answer holds.
const FORMATS = { mpeg: "mp3", flac: "flac", ogg: "ogg", mp4: "m4a", "x-m4a": "m4a", aac: "aac", webm: "webm" };

function kindOf(file) {
  const kind = file.type.split("/")[0];
  return file.type === "application/pdf" ? "file" : ["image", "audio", "video"].includes(kind) ? kind : null;
}

async function readMedium(file) {
  const url = await new Promise((done, failed) => {
    const reader = Object.assign(new FileReader(), { onload: () => done(reader.result), onerror: () => failed(reader.error) });
    reader.readAsDataURL(file);
  });
  const kind = kindOf(file), format = FORMATS[file.type.split("/")[1]?.split(";")[0]] ?? "wav";
  const part = {
    image: { type: "image_url", image_url: { url } },
    audio: { type: "input_audio", input_audio: { data: url.slice(url.indexOf(",") + 1), format } },
    video: { type: "video_url", video_url: { url } },
    file: { type: "file", file: { filename: file.name.slice(0, 255), file_data: url } },
  }[kind];
  return { kind, part, name: file.name, url };
}

function showMedium({ kind, url, name }, small = false) {
  if (kind === "image") return el("img", { src: url, alt: name });
  if (kind === "file") return el("span", { className: "document" }, icon("file"), el("span", { textContent: name }));
  return el(kind, { src: url, controls: !small || kind === "audio", preload: "metadata", ariaLabel: name });
}

function wav(samples, rate) { // Int16Array of one channel
  const head = new DataView(new ArrayBuffer(44)), text = (at, word) => [...word].forEach((c, n) => head.setUint8(at + n, c.charCodeAt(0)));
  text(0, "RIFF"); head.setUint32(4, 36 + samples.byteLength, true); text(8, "WAVEfmt "); head.setUint32(16, 16, true);
  head.setUint16(20, 1, true); head.setUint16(22, 1, true); head.setUint32(24, rate, true); head.setUint32(28, 2 * rate, true);
  head.setUint16(32, 2, true); head.setUint16(34, 16, true); text(36, "data"); head.setUint32(40, samples.byteLength, true);
  return new Blob([head, samples], { type: "audio/wav" });
}

async function asWav(recorded) {
  const rate = 16000, sound = await new OfflineAudioContext(1, 1, rate).decodeAudioData(await recorded.arrayBuffer());
  const mono = new Float32Array(sound.length);
  for (let n = 0; n < sound.numberOfChannels; n++) sound.getChannelData(n).forEach((value, at) => (mono[at] += value / sound.numberOfChannels));
  return new File([wav(Int16Array.from(mono, (value) => Math.max(-1, Math.min(1, value)) * 32767), rate)], "question.wav", { type: "audio/wav" });
}

function soundOf(pieces) { // base64, as they came
  const bytes = Uint8Array.from(pieces.flatMap((piece) => Array.from(atob(piece), (c) => c.charCodeAt(0))));
  const head = String.fromCharCode(...bytes.slice(0, 4));
  const type = { RIFF: "audio/wav", OggS: "audio/ogg", fLaC: "audio/flac" }[head] ?? (head.startsWith("ID3") || bytes[0] === 255 ? "audio/mpeg" : null);
  return type ? new Blob([bytes], { type }) : wav(new Int16Array(bytes.buffer, 0, bytes.length >> 1), 24000);
}

function paint(node, text) {
  const pieces = text.split(/^```[^\n]*\n?/m);
  while (node.children.length > pieces.length) node.lastChild.remove();
  pieces.forEach((piece, at) => {
    const child = node.children[at] ?? node.appendChild(el(at % 2 ? "pre" : "p"));
    const trimmed = piece.replace(/^\n+|\s+$/g, "");
    if (child.textContent !== trimmed) child.textContent = trimmed;
  });
}

// One model and its settings.
let models = [], voice = "default"; // those that converse, and who speaks for them

class Lane {
  constructor(letter, changed) {
    const field = (key, input) => el("label", {}, el("span", { t: key }), input);
    const own = (props) => el("input", { type: "number", inputMode: "decimal", "data-t-placeholder": "own", placeholder: t("own"), ...props });
    this.model = el("select", { label: "model", onchange: () => this.offer(changed) });
    this.temperature = own({ min: 0, max: 2, step: 0.1 });
    this.most = own({ min: 1, step: 1 });
    this.system = el("textarea", { rows: 3 });
    this.makes = el("fieldset", { hidden: true }, el("legend", { t: "answers_with" }));
    this.panel = el("div", { className: "panel" }, field("temperature", this.temperature), field("max_tokens", this.most), field("system", this.system), this.makes);
    this.settings = el("details", { className: "settings" }, el("summary", { className: "quiet icon", label: "settings" }, icon("tune")), this.panel);
    this.letter = letter;
    this.node = el("div", { className: "lane" }, letter && this.mark(), this.model, this.settings);
    this.model.append(...models.map(({ id }) => el("option", { value: id, textContent: id })));
    this.changed = changed;
  }

  mark() { return el("span", { className: "letter", textContent: this.letter }); }

  get card() { return models.find(({ id }) => id === this.model.value); }

  takes(kind) { return (this.card?.modalities?.input ?? ["text"]).includes(kind === "file" ? "image" : kind); }

  offer() {
    const more = (this.card?.modalities?.output ?? []).filter((kind) => kind === "image" || kind === "audio");
    this.makes.hidden = !more.length;
    this.makes.replaceChildren(this.makes.firstChild, ...more.map((kind) =>
      el("label", { className: "check" }, el("input", { type: "checkbox", value: kind }), el("span", { t: `makes_${kind}` }))));
    this.most.max = this.card?.max_completion_tokens ?? "";
    this.changed();
  }

  request(messages) {
    const system = this.system.value.trim(), body = { model: this.model.value, messages };
    if (system) body.messages = [{ role: "system", content: system }, ...messages];
    if (this.temperature.value) body.temperature = Number(this.temperature.value);
    if (this.most.value) body.max_tokens = Number(this.most.value);
    const more = [...this.makes.querySelectorAll(":checked")].map(({ value }) => value);
    if (more.length) body.modalities = ["text", ...more];
    if (more.includes("audio")) body.audio = { voice, format: "pcm16" };
    return body;
  }
}

// A conversation with one model or two.
class Talk {
  constructor(root, count) {
    root.append($("talk").content.cloneNode(true));
    this.root = root;
    this.find = (selector) => root.querySelector(selector);
    [this.area, this.scroller, this.list] = [".composer textarea", ".scroll", ".turns"].map(this.find);
    this.lanes = Array.from({ length: count }, (_, n) => new Lane(count > 1 ? "AB"[n] : null, () => this.greet()));
    this.find(".lanes").append(...this.lanes.map(({ node }) => node));
    if (count > 1) this.lanes[1].model.selectedIndex = Math.min(1, models.length - 1);
    if (count > 1 && models.length === 1) this.lanes[1].temperature.value = 1;
    this.turns = [], this.pending = [], this.running = null;
    const chooser = this.find("input[type=file]");
    chooser.onchange = () => this.add([...chooser.files]).then(() => (chooser.value = ""));
    this.choose = (accept) => (chooser.accept = accept, chooser.click());
    this.find(".attach").onclick = () => this.choose("image/*,audio/*,video/*,application/pdf");
    this.find(".mic").hidden = !navigator.mediaDevices?.getUserMedia;
    this.find(".mic").onclick = () => this.record();
    this.find(".stop").onclick = () => this.stop();
    this.find(".new").onclick = () => this.clear();
    this.find(".composer").onsubmit = (event) => (event.preventDefault(), this.send());
    this.area.oninput = () => this.fit();
    this.area.onkeydown = (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send();
    };
    for (const lane of this.lanes) lane.offer();
    translate(root);
  }

  greet() {
    const kinds = ["image", "audio", "video", "file"].filter((kind) => this.lanes.every((lane) => lane.takes(kind)));
    const names = kinds.map((kind) => t(kind)), last = names.pop();
    const told = names.length ? names.join(t("list")) + t("and") + last : last;
    say(this.find("h1"), this.lanes.length > 1 ? "hello_two" : "hello");
    if (this.lanes.length > 1) say(this.find(".empty p"), "about_two");
    else say(this.find(".empty p"), told ? "about" : "about_text", told);
    this.find(".ideas").replaceChildren(...["image", "video", "audio"].filter((kind) => kinds.includes(kind)).map((kind) =>
      el("button", { type: "button", t: `idea_${kind}`, onclick: () => (this.write(t(`idea_${kind}`)), this.choose(`${kind}/*`)) })));
  }

  fit() {
    this.area.style.height = "auto";
    this.area.style.height = `${Math.min(this.area.scrollHeight, 200)}px`;
  }

  write(text) {
    this.area.value = text;
    this.fit();
    this.area.focus();
  }

  fail(...told) {
    const node = this.find(".composer .error");
    node.hidden = !told.length;
    if (told.length) say(node, ...told);
  }

  async add(files) {
    this.fail();
    for (const file of files) {
      const kind = kindOf(file), most = kind === "image" ? 16 : 24;
      const held = this.turns.reduce((sum, turn) => sum + turn.media.length, this.pending.length);
      if (!kind) this.fail("unknown", file.name);
      else if (!this.lanes.every((lane) => lane.takes(kind))) this.fail("not_taken", file.name, t(kind));
      else if (file.size > most * MIB) this.fail("too_large", file.name, most);
      else if (held >= MAX_MEDIA) this.fail("too_many");
      else this.pending.push(await readMedium(file));
    }
    this.showPending();
    this.area.focus();
  }

  showPending() {
    this.find(".composer .files").replaceChildren(...this.pending.map((medium, at) => el("div", { className: `medium ${medium.kind}` }, showMedium(medium, true),
      el("button", { type: "button", className: "remove", label: ["remove", medium.name], onclick: () => (this.pending.splice(at, 1), this.showPending()) }, icon("close")))));
  }

  async record() {
    const mic = this.find(".mic");
    if (this.recorder) return this.recorder.stop();
    try {
      const stream = await navigator.mediaDevices.getUserMedia({ audio: true }), pieces = [];
      this.recorder = new MediaRecorder(stream);
      this.recorder.ondataavailable = ({ data }) => pieces.push(data);
      this.recorder.onstop = async () => {
        stream.getTracks().forEach((track) => track.stop());
        this.recorder = null;
        mic.ariaPressed = "false";
        label(mic, "record");
        await this.add([await asWav(new Blob(pieces))]).catch((error) => this.fail("no_microphone", error.message));
      };
      this.recorder.start();
      mic.ariaPressed = "true";
      label(mic, "recording");
    } catch (error) {
      this.fail("no_microphone", error.message);
    }
  }

  clear() {
    this.stop();
    this.turns = [];
    this.list.replaceChildren();
    this.root.classList.remove("begun");
    this.fail();
    this.area.focus();
  }

  stop() { this.running?.abort(); }

  async send() {
    const text = this.area.value.trim();
    if (this.running || (!text && !this.pending.length)) return;
    const turn = { text, media: this.pending, answers: [] };
    this.fail();
    this.pending = [];
    this.showPending();
    this.write("");
    this.turns.push(turn);
    const edit = button("edit", "edit", () => this.edit(turn));
    const media = turn.media.length ? el("div", { className: "files" }, ...turn.media.map((medium) => el("div", { className: `medium ${medium.kind}` }, showMedium(medium)))) : null;
    turn.asked = el("div", { className: "asked", role: "group", label: "you" }, media, el("div", { className: "said" }, edit, text ? el("p", { className: "bubble", textContent: text }) : null));
    turn.replies = el("div", { className: "replies" });
    this.list.append(el("article", { className: "turn" }, turn.asked, turn.replies));
    this.root.classList.add("begun");
    this.scroller.scrollTop = this.scroller.scrollHeight;
    await this.answer(turn);
  }

  edit(turn) {
    this.stop();
    const at = this.turns.indexOf(turn);
    for (const late of this.turns.splice(at)) late.asked.parentNode.remove();
    this.pending = [...turn.media];
    this.showPending();
    this.write(turn.text);
    this.root.classList.toggle("begun", at > 0);
  }

  async answer(turn) {
    const running = (this.running = new AbortController());
    this.find(".send").hidden = true;
    this.find(".stop").hidden = false;
    turn.replies.replaceChildren();
    turn.answers = this.lanes.map(() => ({ text: "", images: [], sound: [] }));
    await Promise.all(this.lanes.map((lane, at) => this.ask(turn, lane, at, running.signal)));
    if (this.running !== running) return;
    this.running = null;
    if (document.activeElement === this.find(".stop")) this.area.focus();
    this.find(".send").hidden = false;
    this.find(".stop").hidden = true;
  }

  messages(turn, at) {
    const before = this.turns.slice(0, this.turns.indexOf(turn)).filter(({ answers }) => answers[at]?.text || answers[at]?.images.length);
    const asked = ({ text, media }) => ({ role: "user", content: [...media.map(({ part }) => part), ...(text ? [{ type: "text", text }] : [])] });
    const said = ({ text, images }) => ({ role: "assistant", content: text, ...(images.length ? { images } : {}) });
    return [...before.flatMap((old) => [asked(old), said(old.answers[at])]), asked(turn)];
  }

  async ask(turn, lane, at, signal) {
    const answer = turn.answers[at], request = lane.request(this.messages(turn, at));
    const text = el("div", { className: "text" }), extra = el("div", { className: "files made" }), line = el("div", { className: "line" });
    const node = el("section", { className: "reply waiting", label: ["answer_of", lane.model.value] }, lane.letter && el("div", { className: "whose muted" }, lane.mark(), lane.model.value), text, extra, line);
    say(text.appendChild(el("p", { className: "muted" })), "thinking");
    turn.replies.append(node);
    const begin = performance.now();
    let first = 0, last = 0, usage = null, told = 0, drawing = false;
    const draw = () => {
      drawing = false;
      const low = this.scroller.scrollHeight - this.scroller.scrollTop - this.scroller.clientHeight < 120;
      if (text.firstChild?.dataset.t) text.replaceChildren();
      paint(text, answer.text);
      if (low) this.scroller.scrollTop = this.scroller.scrollHeight;
    };
    const speak = (all) => { // whole sentences to screen readers, the rest at the end
      const ends = [...answer.text.slice(told).matchAll(/[.!?。!?\n]\s|[。!?\n]/g)], stop = all ? answer.text.length : ends.length ? told + ends.at(-1).index + 1 : told;
      if (answer.text.slice(told, stop).trim()) announce(answer.text.slice(told, stop));
      told = stop;
    };
    try {
      const reply = await api("/v1/chat/completions", { ...request, stream: true, stream_options: { include_usage: true } }, signal);
      for await (const event of events(reply)) {
        if (event.error) throw new Error(event.error.message);
        usage = event.usage ?? usage;
        const { content, images, audio } = event.choices?.[0]?.delta ?? {};
        if (event.choices?.length) last = performance.now();
        if (!content && !images && !audio) continue;
        first ||= last;
        answer.text += content ?? "";
        for (const { image_url: { url } } of images ?? []) {
          if (!url.startsWith("data:image/")) continue;
          answer.images.push({ type: "image_url", image_url: { url } });
          extra.append(el("img", { src: url, alt: t("drawn") }));
        }
        if (audio?.data) answer.sound.push(audio.data);
        if (!drawing) (drawing = true, requestAnimationFrame(draw));
        speak(false);
      }
      if (answer.sound.length) extra.append(el("audio", { src: URL.createObjectURL(soundOf(answer.sound)), controls: true, label: "makes_audio" }));
    } catch (error) {
      if (error.name === "AbortError") line.append(el("span", { t: "stopped" }));
      else line.append(el("span", { className: "error", role: "alert", textContent: error.message }));
    }
    draw();
    speak(true);
    node.classList.remove("waiting");
    this.measure(line, usage, first - begin, last - first, performance.now() - begin);
    const saw = button("eye", "saw", () => this.saw(node, saw, request));
    saw.ariaExpanded = "false";
    line.append(el("span", { className: "acts" },
      button("copy", "copy", () => navigator.clipboard?.writeText(answer.text).then(() => announce(t("copied")))),
      button("again", "again", () => !this.running && turn === this.turns.at(-1) && this.answer(turn)), saw));
  }

  measure(line, usage, first, rest, all) {
    const parts = [], details = usage?.prompt_tokens_details ?? {};
    if (usage) parts.push(["tokens_in", number(usage.prompt_tokens)]);
    if (details.image_tokens) parts.push(["of_image", number(details.image_tokens)]);
    if (details.audio_tokens) parts.push(["of_audio", number(details.audio_tokens)]);
    if (details.cached_tokens) parts.push(["cached", number(details.cached_tokens)]);
    if (usage) parts.push(["tokens_out", number(usage.completion_tokens)]);
    parts.push(first > 0 ? ["first", number(first / 1000, 2)] : ["seconds", number(all / 1000, 2)]);
    if (usage?.completion_tokens > 4 && rest > 0) parts.push(["rate", number((usage.completion_tokens - 1) / rest * 1000, 1)]);
    line.append(...parts.map((part) => el("span", { className: "fact", t: part })));
  }

  async saw(node, opener, { model, messages }) {
    const old = node.querySelector(".saw");
    opener.ariaExpanded = String(!old);
    if (old) return old.remove();
    const panel = node.appendChild(el("div", { className: "saw" }, el("p", { className: "muted", t: "thinking" })));
    try {
      const seen = await (await api("/v1/preview", { model, messages })).json();
      panel.replaceChildren(...seen.media.map(({ kind, tokens, facts, image }, at) => el("figure", {},
        el("img", { src: image, alt: Object.values(facts).join("; ") }), el("figcaption", { t: ["media_tokens", t(`one_${kind}`), at + 1, tokens] }),
        el("details", {}, el("summary", { t: "details" }), el("dl", {}, ...Object.entries(facts).flatMap(([name, value]) =>
          [el("dt", { textContent: name }), el("dd", { textContent: value })]))))),
      el("p", { className: "muted", t: ["prompt_tokens", number(seen.prompt_tokens), number(seen.media_tokens)] }));
    } catch (error) {
      panel.replaceChildren(el("p", { className: "error", textContent: error.message }));
    }
    panel.scrollIntoView({ block: "nearest" });
  }
}

// The page around them.
const VIEWS = ["chat", "compare", "runs"], talks = {};

function show(view, focus = false) {
  for (const name of VIEWS) {
    $(name).hidden = name !== view;
    Object.assign($(`tab-${name}`), { ariaSelected: String(name === view), tabIndex: name === view ? 0 : -1 });
  }
  if (location.hash.slice(1) !== view) history.replaceState(null, "", `#${view}`);
  if (focus) $(`tab-${view}`).focus();
  document.dispatchEvent(new CustomEvent("view", { detail: view }));
}

const viewOf = () => VIEWS.find((name) => name === location.hash.slice(1)) ?? "chat";
const theme = (name) => (document.documentElement.dataset.theme = name);
const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");

if (localStorage.getItem("theme")) theme(localStorage.getItem("theme"));
$("theme").onclick = () => {
  const dark = (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  localStorage.setItem("theme", theme(dark ? "light" : "dark"));
};
$("language").onclick = () => {
  localStorage.setItem("language", (language = language === "zh" ? "en" : "zh"));
  translate();
  for (const talk of Object.values(talks)) talk.greet();
  document.dispatchEvent(new Event("language"));
};
for (const [at, name] of VIEWS.entries()) {
  $(`tab-${name}`).onclick = () => show(name);
  $(`tab-${name}`).onkeydown = ({ key }) => {
    const to = { ArrowRight: at + 1, ArrowLeft: at + VIEWS.length - 1, Home: 0, End: VIEWS.length - 1 }[key];
    if (to !== undefined) show(VIEWS[to % VIEWS.length], true);
  };
}
addEventListener("hashchange", () => show(viewOf()));
addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  const open = document.querySelector("details.settings[open]");
  if (open) (open.open = false, open.firstChild.focus());
  else talks[viewOf()]?.stop();
});
addEventListener("pointerdown", ({ target }) => document.querySelectorAll("details.settings[open]").forEach((each) => each.contains(target) || (each.open = false)));
addEventListener("paste", (event) => event.clipboardData.files.length && talks[viewOf()]?.add([...event.clipboardData.files]));
addEventListener("dragover", (event) => hasFiles(event) && (event.preventDefault(), ($("drop").hidden = !talks[viewOf()])));
addEventListener("dragleave", (event) => event.relatedTarget ?? ($("drop").hidden = true));
addEventListener("drop", (event) => {
  $("drop").hidden = true;
  if (!hasFiles(event)) return;
  event.preventDefault();
  talks[viewOf()]?.add([...event.dataTransfer.files]);
});

translate();
show(viewOf());
api("/v1/models").then((answer) => answer.json()).then(({ data }) => {
  const has = ({ modalities = {} }, way, kind) => (modalities[way] ?? ["text"]).includes(kind);
  models = data.filter((card) => has(card, "input", "text") && has(card, "output", "text"));
  voice = data.find((card) => has(card, "output", "audio") && !has(card, "output", "text"))?.id ?? voice;
  talks.chat = new Talk($("chat"), 1);
  talks.compare = new Talk($("compare"), 2);
  talks[viewOf()]?.area.focus();
}).catch((error) => $("chat").append(el("p", { className: "error", role: "alert", textContent: error.message })));
