"""The style sheet of the page: for screens of any width, in light and dark, and for paper."""

STYLE = """
:root { color-scheme: light dark; --text: #1d2430; --quiet: #566073; --ground: #fff; --line: #dfe4ec; --good: #0a6b3d;
  font: 100%/1.5 system-ui, sans-serif; color: var(--text); background: var(--ground) }
* { box-sizing: border-box }
body { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1.25rem 3rem; overflow-wrap: break-word }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 2.5rem 0 .5rem; padding-top: .75rem }
h2 { border-top: 1px solid var(--line) }
p, ul.verdict { max-width: 46rem } .quiet, figcaption, caption { color: var(--quiet) }
ul.verdict { padding-left: 1.2rem; font-weight: 600 }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
caption { text-align: left; padding-bottom: .25rem; font-size: .9rem }
td, th { text-align: left; vertical-align: top; padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--line) }
th { font-weight: 600 } tbody th { min-width: 8.5rem } td.number { white-space: nowrap }
.best { font-weight: 600; color: var(--good) } .best::before { content: "\\2713\\a0" }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: 1rem }
figure { margin: 0; flex: 1 1 20rem; min-width: 0; max-width: 40rem } 
figcaption { font-size: .9rem } svg { width: 100%; height: auto; display: block }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .2rem 1rem; font-size: .9rem }
dt { color: var(--quiet) } dd { margin: 0 }
@media screen and (max-width: 48rem) {
  body { padding: 1rem .9rem 2rem } figure { flex-basis: 100% }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%) }
  table, caption, tbody, tr, th, td { display: block; border: 0; padding: 0 }
  tr { padding: .6rem 0; border-bottom: 1px solid var(--line) } td.number { white-space: normal }
  td[data-label]:not([data-label=""])::before { content: attr(data-label) "\\a0 "; color: var(--quiet) }
  td[data-label]::before { font-weight: 400 }
  td.meaning { font-size: .9rem } dl { grid-template-columns: 1fr } dd { margin-bottom: .4rem }
}
@media screen and (prefers-color-scheme: dark) {
  :root { --text: #e3e7ee; --quiet: #a3aebd; --ground: #14181f; --line: #303848; --good: #6fdca4 }
  svg { filter: invert(.92) hue-rotate(180deg) }
}
@media print {
  @page { margin: 16mm }
  :root { color-scheme: light; font-size: 10pt } body { max-width: none; padding: 0 }
  h2 { break-after: avoid; margin-top: 1.2rem } tr, figure, dl { break-inside: avoid } table { font-size: 9pt }
  tbody th { min-width: 6rem } .pictures { display: block }
  figure { display: inline-block; width: 49%; max-width: none; margin-bottom: .4cm } figure:only-child { width: 65% }
}
"""
