"""Line plots for docs/, drawn by gnuplot: used by the other scripts here and by tests/bench/table.py.

    plot("docs/NAME.svg", "what the picture shows", [{"xlabel": .., "ylabel": .., "series": {name: [(x, y), ..]}}, ..])
"""
import subprocess

# Okabe and Ito's colours, told apart by colour-blind readers too; markers and dashes say the same without colour.
COLOURS = ["#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5a5a5a"]
MARKERS = [7, 5, 9, 13, 11, 15, 1]
MANY_POINTS = 60  # more of them are a line without markers
LETTER = 9  # pixels of a letter of the legend, ample


def quoted(text):
    return "'" + text.replace("'", "''") + "'"


def style(number, looks):
    """Of the series with this number; looks may replace colour and marker (numbers too), dash and width (gnuplot's)."""
    look = {"colour": number, "marker": number, "dash": 1, "width": 2} | looks
    return look | {"colour": COLOURS[look["colour"] % len(COLOURS)], "marker": MARKERS[look["marker"] % len(MARKERS)]}


def curve(source, points, look, title):
    line = f"linewidth {look['width']} linecolor rgb '{look['colour']}' dashtype {look['dash']}"
    marked = "lines" if len(points) > MANY_POINTS else f"linespoints pointtype {look['marker']} pointsize {0.7 if len(points) < 20 else 0.45}"
    return f"{source} with {marked} {line} {title}"


def plot(path, title, panels, looks=None, width=450, height=330):
    """panels: {"xlabel", "ylabel", "series": {name: [(x, y), ...]}, "title", "set": [gnuplot lines]} each, the last two
    optional. A series looks the same in every panel, as looks[name] says (see style); a point whose y is None is left out.
    One legend stands above all panels."""
    names = list(dict.fromkeys(name for panel in panels for name in panel["series"]))
    look = {name: style(number, (looks or {}).get(name, {})) for number, name in enumerate(names)}
    columns = max(1, min(len(names), width * len(panels) // (LETTER * max(map(len, names)) + 60)))
    rows = -(-len(names) // columns)
    above = 66 + 20 * rows + 20 * any("title" in panel for panel in panels)  # pixels of title, legend, panels' titles
    height += above
    lines = [f"set terminal svg noenhanced size {width * len(panels)},{height} font 'Helvetica,14' background '#ffffff'",
             f"set output {quoted(str(path))}", "set encoding utf8", "set border 3 linecolor rgb '#8c8c8c'",
             "set tics nomirror out scale 0.5 textcolor rgb '#333333'",
             "set grid ytics linetype 1 linecolor rgb '#e6e6e6'",
             f"set multiplot title {quoted(title)} font 'Helvetica,{min(16, int(1.7 * width * len(panels) / len(title)))}'",
             f"set key at screen 0.02, screen {1 - 34 / height:.4f} left top vertical maxrows {rows} maxcols {columns} Left reverse "
             "samplen 2 textcolor rgb '#333333'"]
    for number, panel in enumerate(panels):
        left, right = (number + 100 / width) / len(panels), (number + 1 - 20 / width) / len(panels)
        lines += [f"set lmargin at screen {left:.4f}", f"set rmargin at screen {right:.4f}",
                  f"set tmargin at screen {1 - above / height:.4f}", f"set bmargin at screen {72 / height:.4f}",
                  "set xlabel " + quoted(panel["xlabel"]), "set ylabel " + quoted(panel["ylabel"]),
                  "set title " + quoted(panel.get("title", ""))] + panel.get("set", [])
        data, plots = [], []
        for name, points in panel["series"].items():
            points = [(x, y) for x, y in points if y is not None]
            if points:
                plots.append(curve("'-' using 1:2", points, look[name], "notitle"))
                data += [f"{x:.9g} {y:.9g}" for x, y in points] + ["e"]
        if number == 0:
            longest = {name: max((p["series"].get(name, []) for p in panels), key=len) for name in names}
            plots += [curve("NaN", longest[name], look[name], f"title {quoted(name)}") for name in names]
        lines += ["plot " + ", ".join(plots)] + data + ["unset key"]
    subprocess.run(["gnuplot"], input="\n".join(lines + ["unset multiplot", ""]), text=True, check=True)
    with open(path) as f:
        svg = f.read()
    with open(path, "w") as f:
        f.write(svg.replace("<title>Gnuplot</title>", f"<title>{title}</title>", 1))
