// Draws each plotly figure when it comes near the screen: a page has dozens of them.
const observer = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      observer.unobserve(target);
      const { data, layout } = JSON.parse(target.nextElementSibling.textContent);
      Plotly.newPlot(target, data, layout, { responsive: true });
    }
  },
  { rootMargin: "600px" },
);
document.querySelectorAll(".plotly-graph-div").forEach((figure) => observer.observe(figure));
