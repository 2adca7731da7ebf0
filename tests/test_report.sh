#!/usr/bin/env bash
# test_report.sh - report.html as a reader has it: in headless Chromium, at a phone's and a desk's width and on paper.
# Every figure is drawn, nothing sticks out, letters are large enough, no console message. The screenshots are left in
# build/report/ (phone.png, desk.png, dark.png, paper.pdf) to be looked at. Without Chromium that part is skipped.
set -u
cd "$(dirname "$0")/.." || exit 1
. tests/testing.sh
out=build/report
rm -rf "$out"
mkdir -p "$out"

# ---- a report with every section: deep, gated in three ways, a mixture, a sink logit -----------------------------------

settings="vocab_size=65 d_model=16 n_layers=14 n_heads=4 n_kv_heads=2 head_dim=8 d_ff=16 max_seq_len=32 batch_size=4
    gradient_accumulation_steps=1 max_steps=20 warmup_steps=5 learning_rate=1e-2 eval_every=10 eval_windows=4
    data=gen:backcopy,vocab=64 threads=1 use_amp=off"
: > "$out/empty.cfg"
models=
while read -r name keys; do
    # shellcheck disable=SC2086
    ./train "$out/empty.cfg" $settings $keys "output_dir=$out/$name" > "$out/train.log" 2>&1 || bad "train $name"
    models="$models $name:$out/$name"
done << 'END'
baseline gate_position=none
G1-elementwise gate_type=elementwise
G1-headwise gate_type=headwise attention_sink=learned
G2-value gate_position=G2 n_layers=5
END
# shellcheck disable=SC2086
if ./analyze --models $models --num_samples 4 --interventions --lengths 16,32 --output "$out/rep" > "$out/analyze.log" 2>&1 &&
    [ -s "$out/rep/report.html" ]; then ok "the report is written"; else bad "analyze: $(tail -n 1 "$out/analyze.log")" && finish; fi

has gnuplot "the figures, and the report in a browser" || finish
for script in "$out"/rep/figures/*.gp; do
    if [ -s "${script%.gp}.svg" ]; then ok "$(basename "$script")"; else bad "$(basename "$script") drew nothing"; fi
done
browser=
for name in chromium chromium-browser google-chrome chrome; do
    command -v $name > /dev/null && browser=$name && break
done
if [ -z "$browser" ]; then skip "the report in a browser (no Chromium is here)" && finish; fi

# ---- in a browser ------------------------------------------------------------------------------------------------------

# The page in a frame of a given width, since a headless window is not as narrow as a phone; what is seen there as text.
frame() { # WIDTH HEIGHT
    cat << END
<!DOCTYPE html><meta charset="utf-8"><style>body{margin:0}iframe{border:0;width:$1px;height:$2px}pre{display:none}</style>
<iframe id="page" src="rep/report.html"></iframe><pre id="seen">nothing</pre>
<script>
const lines = [""], frame = document.getElementById("page");
frame.onload = () => {
    const d = frame.contentDocument, w = frame.contentWindow;
    d.querySelectorAll("details").forEach(e => e.open = true);
    const figures = [...d.querySelectorAll("figure")];
    lines.push("figures " + figures.length, "width " + d.documentElement.scrollWidth);
    for (const figure of figures) {
        const svg = figure.querySelector("svg"), name = svg.querySelector("[id]").id.replace(/-gnuplot.*/, "");
        const size = svg.getBoundingClientRect(), scale = size.width / svg.viewBox.baseVal.width;
        const shapes = [...svg.querySelectorAll("path, use, circle, polygon, rect, image")].filter(e => {
            const b = e.getBBox();
            return b.width > 0 || b.height > 0;
        });
        const texts = [...svg.querySelectorAll("text")].filter(e => e.textContent.trim());
        const letters = Math.min(...texts.map(e => parseFloat(w.getComputedStyle(e).fontSize) * scale));
        const outside = texts.filter(e => {
            const b = e.getBoundingClientRect();
            return b.left < size.left - 1 || b.right > size.right + 1 || b.top < size.top - 1 || b.bottom > size.bottom + 1;
        });
        const wide = figure.classList.contains("wide");
        lines.push(["figure", name, Math.round(size.width), Math.round(size.height), shapes.length, letters.toFixed(1),
                    outside.length, wide ? "wide" : "plain"].join(" "));
    }
    for (const a of d.querySelectorAll("nav a"))
        if (!d.getElementById(a.getAttribute("href").slice(1))) lines.push("dead " + a.getAttribute("href"));
    for (const s of d.querySelectorAll("section"))
        if (!s.querySelector("h2, h3")) lines.push("unnamed section " + s.id);
    const sections = [...d.querySelectorAll("section[id]")].map(s => s.id);
    lines.push("sections " + sections.join(" "));
    const colours = w.getComputedStyle(d.body);
    lines.push("colours " + colours.backgroundColor + " " + colours.color);
    document.getElementById("seen").textContent = lines.join("\n");
    d.querySelectorAll("details").forEach(e => e.open = false);
    frame.style.height = d.documentElement.scrollHeight + "px";
};
</script>
END
}
browse() { timeout 120 "$browser" --headless=new --no-sandbox --disable-gpu --hide-scrollbars --allow-file-access-from-files \
    --enable-logging=stderr --user-data-dir="$PWD/$out/profile" "$@"; }
page() { echo "file://$PWD/$out/$1"; }

look() { # NAME WIDTH HEIGHT LETTERS [OPTION]: no figure's letters are smaller than LETTERS pixels
    local name=$1 width=$2 height=$3 letters=$4 n problems
    shift 4
    frame "$width" "$height" > "$out/$name.html"
    browse "$@" --window-size=$((width + 20)),"$height" --virtual-time-budget=20000 --dump-dom "$(page "$name.html")" \
        > "$out/$name.dom" 2> "$out/$name.log"
    sed -n '/<pre id="seen">/,/<\/pre>/p' "$out/$name.dom" | sed 's/<pre id="seen">//; s/<\/pre>.*//' > "$out/$name.txt"
    n=$(sed -n 's/^figures //p' "$out/$name.txt")
    if [ "${n:-0}" -ge 30 ] && [ "$n" -eq "$(ls "$out"/rep/figures/*.svg | wc -l)" ]; then ok "$name: all $n figures are there"
    else bad "$name: ${n:-no} figures of $(ls "$out"/rep/figures/*.svg | wc -l)"; fi
    problems=$(awk -v letters="$letters" '$1 == "figure" {
        if (!($3 > 250 && $4 > 100)) print $2 " is " $3 " x " $4
        if (!($5 > 5)) print $2 " has " $5 " shapes"
        if (!($6 >= ($8 == "wide" ? 8 : letters))) print $2 " has letters of " $6 " pixels"
        if ($7 > 0) print $2 " has " $7 " texts that are cut off" }
        $1 == "dead" || $1 == "unnamed"' "$out/$name.txt")
    if [ -z "$problems" ]; then ok "$name: every figure is drawn, whole and legible"
    else bad "$name: $(head -n 3 <<< "$problems" | tr '\n' ';')"; fi
    if [ "$(sed -n 's/^width //p' "$out/$name.txt")" = "$width" ]; then ok "$name: nothing sticks out"
    else bad "$name: the page is $(sed -n 's/^width //p' "$out/$name.txt") wide, not $width"; fi
    if grep -q "CONSOLE" "$out/$name.log"; then bad "$name: $(grep -m 1 CONSOLE "$out/$name.log")"; else ok "$name: no console message"; fi
    browse "$@" --window-size=$((width < 500 ? 500 : width)),16000 --screenshot="$PWD/$out/$name.png" "$(page "$name.html")" > /dev/null 2>&1
    [ -s "$out/$name.png" ] && ok "$name: screenshot" || bad "$name: no screenshot"
}
# brightness NAME: of the page and of its letters, 0 to 255
brightness() { sed -n 's/^colours //p' "$out/$1.txt" | awk -F'[^0-9]+' 'NF == 8 { print int(($2 + $3 + $4) / 3), int(($5 + $6 + $7) / 3) }'; }

look phone 390 20000 8
look desk 1200 20000 10

for id in maps f-attn heads places entropy drain histograms gate magnitude sparsity m-act carriers rank interventions lengths \
    training depth paper method; do
    if grep -qE "^sections (.* )?$id( |\$)" "$out/desk.txt"; then ok "section $id"; else bad "section $id is missing"; fi
done
look dark 1200 20000 10 --blink-settings=preferredColorScheme=0
check "by day dark letters on a bright page" awk 'END { exit !($1 > 200 && $2 < 100) }' <<< "$(brightness desk)"
check "by night bright letters on a dark page" awk 'END { exit !($1 < 60 && $2 > 180) }' <<< "$(brightness dark)"
browse --no-pdf-header-footer --print-to-pdf="$PWD/$out/paper.pdf" "$(page rep/report.html)" > /dev/null 2>&1
if [ -s "$out/paper.pdf" ] && [ "$(grep -aEc '/Type */Page($|[^s])' "$out/paper.pdf")" -ge 5 ]; then ok "on paper"; else bad "on paper"; fi
rm -rf "$out/profile"
finish
