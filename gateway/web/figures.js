// Numbers and times as the page writes them.

const WHOLE = new Intl.NumberFormat("en");
const SHORT = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

export const whole = (number) => WHOLE.format(number);
export const short = (number) => (number < 10_000 ? WHOLE.format(number) : SHORT.format(number));
export const percent = (share) => (share > 0 && share < 0.0005 ? "< 0.1 %" : `${(share * 100).toFixed(share < 0.0995 ? 1 : 0)} %`);

export function duration(ms) {
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 60_000) return `${(ms / 1000).toFixed(1)} s`;
  return `${Math.floor(ms / 60_000)} min ${Math.round((ms % 60_000) / 1000)} s`;
}

export const countdown = (ms) => `${Math.max(1, Math.ceil(ms / 1000))} s`;

export const bits = (entropy) => `${entropy.toFixed(2)} bits`;

export function day(unixSeconds) {
  return new Date(unixSeconds * 1000).toLocaleDateString("en-CA");
}

// Writes a day of the ledger, which counts in UTC: Nov 8.
export const shortDay = (isoDate) => new Date(isoDate).toLocaleDateString("en", { month: "short", day: "numeric", timeZone: "UTC" });

export function ago(ms) {
  const minutes = Math.round((Date.now() - ms) / 60_000);
  if (minutes < 1) return "just now";
  if (minutes < 60) return `${minutes} min ago`;
  if (minutes < 48 * 60) return `${Math.round(minutes / 60)} h ago`;
  return `${Math.round(minutes / 1440)} days ago`;
}
