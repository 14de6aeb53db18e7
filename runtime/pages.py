"""Pictures and pages, for watch.py and evaluate.py. Imports no torch.

    panels = {'loss': partial(draw_panel, run)}      # a panel is a function that draws into the axes of matplotlib
    draw(panels, 'a heading')                        # the bytes of one PNG with all panels
    page('a title', {'Curves': drawings(panels), 'Config': table(rows)})   # HTML without scripts; it loads no files
"""
import html
import io
import os
import re
from statistics import fmean

from configurator import UserError

INK = '#2b2d31'  # axes and text of pictures; pages replace it by their text colour, dark or light
INKED = 'text.color', 'axes.edgecolor', 'axes.labelcolor', 'xtick.color', 'ytick.color'
STYLE = {**dict.fromkeys(INKED, INK),
         'font.size': 9, 'axes.titlelocation': 'left', 'axes.spines.top': False, 'axes.spines.right': False,
         'axes.grid': True, 'grid.alpha': 0.3, 'legend.frameon': False, 'legend.fontsize': 8,
         'legend.handlelength': 1.2, 'legend.columnspacing': 1, 'svg.fonttype': 'none', 'svg.hashsalt': 'nanotrix'}
CSS = '''
:root { color-scheme: light dark } h1, h2 { font-weight: 600 } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
.big { font-size: 2.6rem; font-weight: 600; line-height: 1.1; margin: 1rem 0 0 }
.big small { font-size: 1rem; font-weight: 400 }
table { border-collapse: collapse } .scroll { overflow: auto; max-height: 50rem }
@media print { .scroll { max-height: none } } td:first-child { min-width: 8rem }
th, td { text-align: left; vertical-align: top; padding: .2rem 1.5rem .2rem 0; border-bottom: 1px solid #8884 }
pre { font-size: 12px; line-height: 1.4; margin: .3rem 0; min-width: 16rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1rem }
svg { width: 100%; height: auto }
'''


def series(lines, key, x='step'):
    """The points of a curve as two lists. Skips lines that lack one of the numbers."""
    points = [(line[x], line[key]) for line in lines if x in line and key in line]
    return [a for a, _ in points], [b for _, b in points]


def running_mean(values, n=80):
    """
    The mean around each value, over 1/n of all values on each side. Long curves of any length look equally smooth.
    Fewer than n values stay as they are: the mean of three of five would flatten the curve.
    """
    half = len(values) // n
    return [fmean(values[max(0, i - half):i + half + 1]) for i in range(len(values))]


def curve(axes, lines, key, color, label='', x='step', smoothed=False, **style):
    """Plot one number of the lines, if they have it. smoothed: its running mean, with raw values as a thin line."""
    a, b = series(lines, key, x)
    if not a:
        return
    many = len(a) > 5000  # as vectors, a page would store every point
    if len(a) == 1 and not style.get('marker'):  # a line of one point is invisible
        style.update(marker='o', markersize=3)
    if smoothed:
        axes.plot(a, b, color=color, linewidth=0.7, alpha=0.3, rasterized=many)
        b = running_mean(b)
    axes.plot(a, b, color=color, label=label.replace('$', r'\$') or None, rasterized=many, **style)


def draw(panels, heading='', kind='png'):
    """Draw the panels in one picture -> the bytes of a PNG or SVG."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except (ImportError, ValueError) as error:  # the package is missing, or MPLBACKEND is invalid
        raise UserError(f'no picture: matplotlib cannot be used: {error}')
    epoch = os.environ.get('SOURCE_DATE_EPOCH') or '0'
    if not epoch.isdecimal():  # matplotlib uses it as the date of a drawing
        raise UserError(f'SOURCE_DATE_EPOCH={epoch}: expected a number of seconds')
    content, columns = io.BytesIO(), min(2, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.5 * columns, 3.5 * rows), layout='constrained')
        for i, (title, panel) in enumerate(panels.items()):
            panel(figure.add_subplot(rows, columns, i + 1, title=title))
        figure.suptitle(heading.replace('$', r'\$'))
        figure.savefig(content, format=kind, dpi=120, transparent=kind == 'svg')
    return content.getvalue()


def drawings(panels):
    """The panels as inline SVG in the page's text colour. Each drawing's ids get a prefix, so ids never clash."""
    found = []
    for i, (title, panel) in enumerate(panels.items()):
        source = draw({title: panel}, kind='svg').decode()
        source = re.sub('<metadata>.*?</metadata>', '', source[source.index('<svg'):], flags=re.DOTALL)
        source = source.replace(INK, 'currentColor')
        found.append(re.sub(r'( id="|url\(#|href="#)', rf'\g<1>d{i}-', source))
    return f'<div class="curves">{"".join(found)}</div>'


def table(rows):
    """An HTML table of texts, header first ('' if no other rows). In a cell, lines after the first are <pre>."""
    lines = []
    for tag, row in zip(('th', *['td'] * len(rows)), rows):
        cells = []
        for cell in row:
            first, _, rest = html.escape(cell).partition('\n')
            rest = f'<pre>{rest}</pre>' if rest else ''
            cells.append(f'<{tag}>{first}{rest}</{tag}>')
        lines.append('<tr>' + ''.join(cells) + '</tr>')
    return '<div class="scroll"><table>' + '\n'.join(lines) + '</table></div>' if len(rows) > 1 else ''


def big_number(value, name):
    return f'<p class="big">{html.escape(value)} <small>{html.escape(name)}</small></p>'


def page(title, parts):
    """An HTML page. parts: {heading: HTML}, in order. A heading that starts with a blank is not shown."""
    title, body = html.escape(title), ''
    for heading, content in parts.items():
        if content:
            body += (f'<h2>{html.escape(heading)}</h2>\n' if heading[:1].strip() else '') + f'{content}\n'
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width"><title>{title}</title><style>{CSS}</style></head>\n'
            f'<body><h1>{title}</h1>\n{body}</body></html>\n')
