// Sphinx's weights; of pages with equal ones, those whose title has the words come first.
var Scorer = {
  score([, title, , , score]) {
    const words = new URLSearchParams(location.search).get("q").toLowerCase().split(/\s+/);
    return score + 2 * words.filter((word) => title.toLowerCase().includes(word)).length;
  },
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
