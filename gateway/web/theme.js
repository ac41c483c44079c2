// Sets the theme before anything is painted. A classic script, because modules run too late for that.
(() => {
  try {
    const theme = localStorage.getItem("shannon.theme");
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  } catch {
    // Without storage the system's choice holds.
  }
})();
