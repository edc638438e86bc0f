"""The look of a page: colours for light and dark, and one style sheet. Nothing is loaded from anywhere."""

import base64
import hashlib

from launcher.report.markup import Html, element

COLOURS = {  # role: light, dark. Figures are drawn in the light ones, which are therefore all different.
    "page": ("#f6f6f4", "#121315"),
    "card": ("#ffffff", "#1b1c1f"),
    "line": ("#e2e2dd", "#303237"),
    "ink": ("#1c1d1f", "#ececea"),
    "muted": ("#63656b", "#a2a5ad"),
    "soft": ("#efefec", "#26282c"),
    "train": ("#2563a8", "#74aef2"),
    "train-pale": ("#a8c3e2", "#46698f"),
    "heldout": ("#c2410c", "#fb9a63"),
    "disk": ("#3b3d42", "#d6d7db"),
    "best": ("#0a7a56", "#4fd0a0"),
    "best-pale": ("#e3f3ec", "#16322a"),
    "warn": ("#8f5b00", "#e6b450"),
    "warn-pale": ("#fdf3dc", "#332a16"),
    "bad": ("#b4232f", "#ff8a8f"),
    "bad-pale": ("#fce9ea", "#3b1d20"),
    "run-1": ("#c2410d", "#fb9a64"),
    "run-2": ("#2563a9", "#74aef3"),
    "run-3": ("#0a7a57", "#4fd0a1"),
    "run-4": ("#7c3aad", "#c49bf0"),
    "run-5": ("#8a6a00", "#dcb83f"),
    "run-6": ("#be2b78", "#f58cc0"),
    "run-7": ("#0e7490", "#56c7e0"),
    "run-8": ("#57534e", "#b5b0a9"),
}
RUN_COLOURS = [role for role in COLOURS if role.startswith("run-")]
LIGHT = {role: light for role, (light, _) in COLOURS.items()}

_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-padding-top:4rem}
body{margin:0;background:var(--page);color:var(--ink);
 font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Liberation Sans",Arial,sans-serif;
 font-variant-numeric:tabular-nums}
main,.bar>div,footer{max-width:1100px;margin:0 auto;padding:0 24px}
h1,h2,h3{line-height:1.2;letter-spacing:-.015em;margin:0;font-weight:650}
h1{font-size:30px;overflow-wrap:anywhere}h2{font-size:20px}h3{font-size:15px;letter-spacing:0}
p{margin:0}a{color:var(--train)}
code,pre{font-family:ui-monospace,SFMono-Regular,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace;font-size:13px}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;tab-size:4;unicode-bidi:isolate}
bdi{unicode-bidi:isolate}
.muted{color:var(--muted)}.small{font-size:13px}
.bar{position:sticky;top:0;z-index:2;background:var(--page);border-bottom:1px solid var(--line)}
.bar>div{display:flex;gap:20px;align-items:center;min-height:52px}
.bar nav{display:flex;gap:18px;overflow-x:auto;flex:1;white-space:nowrap;scrollbar-width:none}
.bar nav a{color:var(--muted);text-decoration:none;font-size:14px}.bar nav a:hover{color:var(--ink)}
.switch{display:flex;border:0;margin:0;padding:3px;background:var(--soft);border-radius:9px;flex:none}
.switch legend{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.switch input{position:absolute;opacity:0;width:1px;height:1px;margin:0}
.switch label{padding:3px 12px;border-radius:7px;font-size:13px;color:var(--muted);cursor:pointer}
.switch input:checked+label{background:var(--card);color:var(--ink);box-shadow:0 1px 2px rgb(0 0 0/.14)}
.switch input:focus-visible+label{outline:2px solid var(--train);outline-offset:1px}
.head{padding:34px 0 22px;display:flex;flex-wrap:wrap;gap:8px 14px;align-items:center}
.head p{flex-basis:100%;color:var(--muted)}
.badge{display:inline-block;padding:1px 9px;border-radius:99px;font-size:12.5px;font-weight:600;white-space:nowrap;
 background:var(--soft);color:var(--muted)}
.badge.go{color:var(--train)}.badge.best{background:var(--best-pale);color:var(--best)}.badge.warn{background:var(--warn-pale);color:var(--warn)}
.badge.bad{background:var(--bad-pale);color:var(--bad)}.head .badge{font-size:14px;padding:3px 12px}
.dot{display:inline-block;width:10px;height:10px;border-radius:50%;margin-right:8px}
.badge+.badge{margin-left:4px}
.progress{flex-basis:100%;height:6px;border-radius:3px;overflow:hidden;display:block;width:100%}
.progress .rest{fill:var(--line)}.progress .done{fill:var(--train)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:14px}
.card,section{background:var(--card);border:1px solid var(--line);border-radius:14px}
.card{padding:16px 18px 18px;min-width:0}
.card h3{color:var(--muted);font-weight:500;font-size:13.5px;margin-bottom:6px}
.card .big{font-size:25px;font-weight:650;letter-spacing:-.02em;line-height:1.2;overflow-wrap:anywhere}
.card p+p{margin-top:6px}.card pre{margin:4px 0 8px}.card .small{color:var(--muted)}
.card.bad{border-color:var(--bad)}.card.bad .big{color:var(--bad)}.card.best .big{color:var(--best)}
.card.warn .big{color:var(--warn)}
.card ul{margin:6px 0 0;padding-left:18px;font-size:14px}.card li+li{margin-top:4px}.card li{overflow-wrap:anywhere}
section{margin-top:14px;padding:22px 24px 24px}
section>h3{margin-top:22px}
section>p,section>.lead{margin-top:6px;max-width:78ch;color:var(--muted);font-size:14px}
section>.notice{max-width:none;padding:10px 14px;border-radius:9px;background:var(--soft);margin-top:14px}
section>.notice.warn{background:var(--warn-pale);color:var(--warn)}
.loud{margin-top:14px;padding:16px 20px;border-radius:14px;background:var(--warn-pale);border:1px solid var(--warn);
 color:var(--warn)}.loud ul{margin:6px 0 0;padding-left:20px}.loud li{overflow-wrap:anywhere}
.chart{margin-top:16px}.chart svg{display:block;width:100%;height:auto;overflow:visible}
.chart svg *{stroke-linejoin:round}
.chart text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Liberation Sans",Arial,sans-serif}
.narrow,.by-epochs,.by-tokens{display:none}
.how{display:grid;gap:10px;margin-top:16px}
.how div{display:grid;grid-template-columns:150px 1fr;gap:4px 16px;align-items:baseline}
.how span{color:var(--muted);font-size:14px}
.how pre{background:var(--soft);border-radius:8px;padding:8px 12px}
.scroll{overflow-x:auto;margin-top:16px}
table{border-collapse:collapse;width:100%;font-size:14px}
th{color:var(--muted);font-weight:500;font-size:12.5px;text-align:left;vertical-align:bottom}
th,td{padding:7px 12px 7px 0;border-bottom:1px solid var(--line);white-space:nowrap}
td.n,th.n{text-align:right}tr.best td{background:var(--best-pale)}
tr:last-child td{border-bottom:0}td:first-child,th:first-child{padding-left:10px}
details{margin-top:14px}summary{cursor:pointer;color:var(--train);font-size:14px}
details>pre{margin-top:12px}
.texts{display:grid;gap:14px;margin-top:16px}
.texts article{display:grid;grid-template-columns:110px 1fr;gap:4px 16px;align-items:start}
.texts h3{color:var(--muted);font-weight:500;font-size:14px;padding-top:9px}
.texts pre{background:var(--soft);border-radius:9px;padding:10px 14px;max-height:14em;overflow:auto}
.texts .prompt{color:var(--muted)}
.log{list-style:none;margin:16px 0 0;padding:0}
.log li{display:grid;grid-template-columns:130px 170px 1fr;gap:2px 16px;padding:9px 0 9px 16px;
 border-left:2px solid var(--line);position:relative;align-items:baseline}
.log li::before{content:"";position:absolute;left:-5px;top:16px;width:8px;height:8px;border-radius:50%;
 background:var(--muted)}
.log li.warn::before{background:var(--warn)}.log li.bad::before{background:var(--bad)}
.log li.best::before{background:var(--best)}.log time{color:var(--muted);font-size:13.5px}
.log .what{overflow-wrap:anywhere}
footer{color:var(--muted);font-size:13px;padding-top:22px;padding-bottom:40px}
@media(max-width:680px){
 main,.bar>div,footer{padding-left:14px;padding-right:14px}
 .bar nav{display:none}.bar>div{justify-content:center}
 h1{font-size:25px}.head{padding:22px 0 16px}section{padding:18px 16px}
 .wide{display:none}.narrow{display:block}
 .how div,.texts article,.log li{grid-template-columns:1fr}.texts h3{padding-top:0}
}
@media print{
 body{background:#fff;font-size:12px}.bar{display:none}.card,section{break-inside:avoid}
 section:has(.texts),section:has(.log),section:has(table){break-inside:auto}
 .texts pre{max-height:none}
}
"""


def _variables(which: int) -> str:
    return ":root{" + "".join(f"--{role}:{pair[which]};" for role, pair in COLOURS.items()) + "}"


def _axis_rules() -> str:
    """Which axis is shown is the state of three radio buttons: no script is needed, and none is allowed."""
    rules = [".narrow.by-epochs,.narrow.by-tokens{display:none}"]
    for axis in ("epochs", "tokens"):
        chosen = f"body:has(#axis-{axis}:checked)"
        rules.append(f"{chosen} .by-steps{{display:none}}{chosen} .by-{axis}{{display:block}}")
        rules.append(f"@media(max-width:680px){{{chosen} .wide.by-{axis}{{display:none}}}}")
        rules.append(f"@media(min-width:680.01px){{{chosen} .narrow.by-{axis}{{display:none}}}}")
    return "".join(rules)


def style_sheet() -> str:
    """Dark where the reader's system is, on screens; paper is white."""
    figures = "".join(f".b-{role}{{background:var(--{role})}}" for role in RUN_COLOURS)
    figures += "".join(f".f-{role}{{fill:var(--{role})}}.s-{role}{{stroke:var(--{role})}}" for role in COLOURS)
    dark = f"@media screen and (prefers-color-scheme:dark){{{_variables(1)}}}"
    return f"{_variables(0)}{dark}{_RULES}{figures}{_axis_rules()}"


def document(title: str, body: Html) -> str:
    """A whole page. Its policy allows this one style sheet, and nothing else: no script, no connection, no image."""
    style = style_sheet()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    head = [
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name_="color-scheme", content="light dark"),
        element("meta", name_="referrer", content="no-referrer"),
        element("title", title),
        Html(f"<style>{style}</style>"),
    ]
    return f'<!doctype html>\n<html lang="en"><head>{"".join(head)}</head><body>{body}</body></html>\n'
