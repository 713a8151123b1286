// Numbers, durations and times as text.

export const sum = (values) => values.reduce((total, value) => total + value, 0);

export const formatCount = (n) => n < 1e5 ? Math.round(n).toLocaleString("en") : `${Math.round(n / 1e3)}k`;

export function formatNumber(n) {
  if (n == null) return "–";
  if (n < 0.995) return `${+n.toFixed(2)}`;
  return n < 99.95 ? n.toFixed(1) : formatCount(n);
}

export function formatDuration(seconds) {
  if (seconds < 120) return `${Math.floor(seconds)} s`;
  return seconds < 7200 ? `${Math.floor(seconds / 60)} min` : `${Math.floor(seconds / 3600)} h`;
}

// The local time `ago` seconds before now.
export const formatTime = (ago) => new Date(Date.now() - ago * 1000).toLocaleTimeString("en-GB");

export const formatPython = (value) => ({ true: "True", false: "False" })[value] ?? JSON.stringify(value);

export const formatSetting = (value) => ({ true: "on", false: "off" })[value] ?? `${value}`;
