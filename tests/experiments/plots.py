"""Line plots for docs/, drawn by gnuplot: used by tests/experiments/sweep.py, tests/experiments/late_gate.py and tests/experiments/lengths.py."""
import subprocess

COLOURS = ["#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5a5a5a"]


def quoted(text):
    return "'" + text.replace("'", "''") + "'"


def plot(path, title, panels, width=430, height=420):
    """panels: {"xlabel", "ylabel", "series": {name: [(x, y), ...]}, "set": [gnuplot lines]} each. A series keeps its colour
    in every panel; a point whose y is None is left out."""
    names = list(dict.fromkeys(name for panel in panels for name in panel["series"]))
    lines = [f"set terminal svg noenhanced size {width * len(panels)},{height} font 'Helvetica,14' background '#ffffff'",
             f"set output {quoted(path)}", "set encoding utf8", "set border 3 linecolor rgb '#8c8c8c'",
             "set tics nomirror out scale 0.5 textcolor rgb '#333333'",
             "set grid ytics linetype 1 linecolor rgb '#e6e6e6'",
             f"set key tmargin left vertical maxrows {len(names)} Left reverse samplen 1.6 textcolor rgb '#333333'",
             f"set tmargin {len(names) + 1}", f"set multiplot layout 1,{len(panels)}"]
    for panel in panels:
        lines += ["set xlabel " + quoted(panel["xlabel"]), "set ylabel " + quoted(panel["ylabel"])] + panel.get("set", [])
        data, plots = [], []
        for name, points in panel["series"].items():
            points = [(x, y) for x, y in points if y is not None]
            if not points:
                continue
            colour = COLOURS[names.index(name) % len(COLOURS)]
            plots.append(f"'-' using 1:2 with linespoints pointtype 7 pointsize 0.5 linewidth 2 linecolor rgb '{colour}' "
                         f"title {quoted(name)}")
            data += [f"{x:.9g} {y:.9g}" for x, y in points] + ["e"]
        lines += ["plot " + ", ".join(plots)] + data
    subprocess.run(["gnuplot"], input="\n".join(lines + ["unset multiplot", ""]), text=True, check=True)
    with open(path) as f:
        svg = f.read()
    with open(path, "w") as f:
        f.write(svg.replace("<title>Gnuplot</title>", f"<title>{title}</title>", 1))
