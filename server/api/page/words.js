// What the page says, in English and in Chinese; the English of what stands in page.html is there.

const ENGLISH = {
  ready: "ready", loading: "loading", stopping: "shutting down", away: "no answer", locked: "wants a key",
  reading: (done, total) => `The model is being read: ${done} of ${total} GB.`, warming: "The model is being warmed up; it will be there in a moment.",
  opening: "The model's file is being opened.", empty: "What shall we talk about?", waiting: "waiting", thinking: "Thinking …", thought: (s) => `Thought for ${s} s`,
  copy: "Copy", copied: "Copied", again: "Again", stopped: "stopped", cut: "ended at the limit of tokens", tokens: (n) => `${n} tokens`, after: (s) => `first after ${s} s`,
  lost: "The connection to the server was lost.",
};
const CHINESE = {
  ready: "就绪", loading: "加载中", stopping: "正在关闭", away: "无响应", locked: "需要密钥",
  reading: (done, total) => `正在读取模型：${done} / ${total} GB。`, warming: "模型正在预热，马上就好。", opening: "正在打开模型文件。",
  empty: "想聊点什么？", waiting: "等待中", thinking: "思考中……", thought: (s) => `思考了 ${s} 秒`, copy: "复制", copied: "已复制", again: "重新生成", stopped: "已停止",
  cut: "达到 token 上限", tokens: (n) => `${n} 个 token`, after: (s) => `首个 token ${s} 秒`, lost: "与服务器的连接已断开。",
  skip: "跳到输入框", new: "新对话", settings: "设置", figures: "实时指标", decode: "解码", prefill: "预填充", first: "首个 token", queue: "运行 + 排队", kv: "KV 缓存",
  pool: "CPU 线程池", ram: "内存读取", curve: "最近两分钟的解码速度", conversation: "对话", message: "消息", send: "发送", stop: "停止", system: "系统提示词",
  placeholder: "输入问题，Enter 发送", temperature: "温度", maxTokens: "最多 token 数", key: "API 密钥", done: "完成",
  keyNote: "只保存在当前标签页，关闭后即消失。留空则使用服务器的默认值。", decodeHint: "每秒生成的 token 数；空闲时为上一次回复的速度",
  prefillHint: "每秒处理的提示词 token 数；空闲时为上一次的速度", firstHint: "本页上一次回复从发送到首个 token 的时间", queueHint: "正在运行和排队的请求",
  kvHint: "KV 缓存的已用比例", poolHint: "CPU 线程池工作时间的占比", ramHint: "每秒从内存读取的权重", gpuHint: "GPU 工作时间的占比",
};
export const words = navigator.language.startsWith("zh") ? { ...ENGLISH, ...CHINESE } : ENGLISH;

export function translate() {
  if (words === ENGLISH) return;
  document.documentElement.lang = "zh-CN";
  for (const node of document.querySelectorAll("[data-text]")) node.textContent = words[node.dataset.text];
  for (const node of document.querySelectorAll("[data-label]")) node.setAttribute("aria-label", words[node.dataset.label]);
  for (const node of document.querySelectorAll("[data-hint]")) node.title = words[node.dataset.hint];
  document.getElementById("prompt").placeholder = words.placeholder;
}
