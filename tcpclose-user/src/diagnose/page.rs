//! The page of `diagnose --html`: a single file without scripts that loads nothing.
//!
//! All text from outside is escaped ([`Escaped`]). In addition, a content security policy forbids scripts and
//! loading.

use std::fmt::Write as _;

use std::{
    collections::BTreeMap,
    fmt::{self, Display},
    io::{self, Write},
};

use crate::{
    diagnose::{
        Totals,
        pictures::{Pictures, Timeline},
    },
    event::{Evidence, Finding},
    sink::human_millis,
};

/// Text for HTML and SVG, between tags and in attributes.
struct Escaped<'a>(&'a str);

impl Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.chars() {
            match character {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                '\'' => f.write_str("&#39;")?,
                // Control characters are not allowed in HTML, and direction marks would reorder the text.
                character
                    if character.is_control()
                        || matches!(character, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}') =>
                {
                    write!(f, "{}", character.escape_unicode())?;
                }
                character => write!(f, "{character}")?,
            }
        }
        Ok(())
    }
}

const STYLE: &str = "
body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:62em;padding:0 1em}
body{color:#1b1f24;background:#fff}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}
section.finding{border-left:4px solid #c0392b;padding:.2em 1em;margin:1.2em 0;background:#f7f8fa}
section.deploy{border-color:#2e7d4f}
h3{margin:.3em 0}small,.note{color:#57606a}p{margin:.4em 0}
table{border-collapse:collapse;font-size:.9em}td{padding:0 1.2em 0 0}td+td{font-variant-numeric:tabular-nums}
.wide{overflow-x:auto}svg{width:100%;min-width:56em;height:auto;font:11px system-ui,sans-serif}
.key{display:inline-block;width:.8em;height:.8em;margin:0 .3em 0 1em}
@media(prefers-color-scheme:dark){body{color:#e6e6e6;background:#16181c}section.finding{background:#20242a}
small,.note{color:#9aa4af}svg text{fill:#e6e6e6}svg .flame text{fill:#1b1f24}}
";

/// Of series, in the order of their names.
const COLOURS: [&str; 10] = [
    "#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f", "#edc948", "#b07aa1", "#ff9da7", "#9c755f",
    "#888888",
];

/// Writes the page.
pub fn write(
    out: &mut impl Write,
    findings: &[Finding],
    totals: Totals,
    pictures: &Pictures,
) -> io::Result<()> {
    writeln!(
        out,
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" \
         content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n\
         <title>tcpclose diagnose</title>\n\
         <style>{STYLE}</style></head><body>\n<h1>How connections ended</h1>"
    )?;
    writeln!(
        out,
        "<p class=\"note\">{} lines, {} ends of connections. Both ends of {} connections were joined by \
         their addresses, which is not possible through NAT.",
        totals.lines, totals.ends, totals.joined
    )?;
    if totals.lost > 0 {
        writeln!(out, " Events lost in tracing: {}; counts are too low.", totals.lost)?;
    }
    writeln!(out, "</p>\n<h2>Findings</h2>")?;
    if findings.is_empty() {
        writeln!(out, "<p>None.</p>")?;
    }
    findings.iter().try_for_each(|finding| write_finding(out, finding))?;
    writeln!(out, "<h2>Ends of connections over time, by cause</h2>")?;
    bars(out, &pictures.ends)?;
    writeln!(
        out,
        "<h2>Sockets in CLOSE_WAIT</h2>\n<p class=\"note\">The peer has closed, the program has not.</p>"
    )?;
    level(out, &pictures.close_wait, &pictures.ends)?;
    writeln!(
        out,
        "<h2>Sockets in TIME_WAIT</h2>\n<p class=\"note\">Those whose end was traced; each stays for 60 \
         s.</p>"
    )?;
    level(out, &pictures.time_wait, &pictures.ends)?;
    writeln!(
        out,
        "<h2>Where programs closed</h2>\n<p class=\"note\">Flame graph of the stacks that ended connections: \
         the program above, what it called below, as wide as it is frequent. Point at a frame for its \
         name.</p>"
    )?;
    flames(out, pictures)?;
    writeln!(out, "</body></html>")
}

fn write_finding(out: &mut impl Write, finding: &Finding) -> io::Result<()> {
    let kind = finding.kind.to_string();
    let clock = |time: crate::event::Time| time.0.strftime("%Y-%m-%d %H:%M:%S").to_string();
    writeln!(
        out,
        "<section class=\"finding {0}\"><h3>{0}</h3>\n<p>{1}</p>\n<p><b>What to change.</b> \
         {2}</p>\n<details><summary><small>{3} · {4} to {5} UTC · {6}</small></summary><table>",
        Escaped(&kind),
        Escaped(&finding.summary),
        Escaped(&finding.advice),
        finding.count,
        clock(finding.first),
        clock(finding.last),
        finding.confidence
    )?;
    for (name, value) in &finding.evidence {
        let value = match value {
            Evidence::Count(count) => count.to_string(),
            Evidence::Number(number) => number.to_string(),
            Evidence::Text(text) => text.clone(),
            Evidence::Unknown => "not known".to_owned(),
        };
        writeln!(out, "<tr><td>{}</td><td>{}</td></tr>", Escaped(name), Escaped(&value))?;
    }
    let lines: Vec<_> = finding.lines.iter().map(u64::to_string).collect();
    writeln!(out, "<tr><td>lines (seq)</td><td>{}</td></tr></table></details></section>", lines.join(", "))
}

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 180.0;
/// The width of the axis labels.
const LEFT: f64 = 50.0;

#[expect(clippy::cast_precision_loss, reason = "coordinates")]
fn bars(out: &mut impl Write, timeline: &Timeline) -> io::Result<()> {
    if timeline.series.is_empty() {
        return writeln!(out, "<p>None.</p>");
    }
    writeln!(out, "<p class=\"note\">Each bar is {}.</p>", human_millis(timeline.step as f64 / 1e6))?;
    let length = timeline.length();
    let total = |index: usize| timeline.series.values().map(|points| points[index]).sum::<i64>();
    let most = (0..length).map(total).max().unwrap_or_default().max(1);
    begin(out, most, timeline, length)?;
    let width = (WIDTH - LEFT) / length as f64;
    for index in 0..length {
        let mut below = 0.0;
        for (position, (name, points)) in timeline.series.iter().enumerate() {
            let count = points[index];
            if count <= 0 {
                continue;
            }
            let height = count as f64 * HEIGHT / most as f64;
            writeln!(
                out,
                "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.2}\" height=\"{height:.2}\" fill=\"{}\"><title>{}: \
                 {count}</title></rect>",
                LEFT + index as f64 * width,
                HEIGHT - below - height,
                (width * 0.92).max(0.5),
                colour(position),
                Escaped(name)
            )?;
            below += height;
        }
    }
    writeln!(out, "</svg></div><p>")?;
    for (position, name) in timeline.series.keys().enumerate() {
        write!(
            out,
            "<span class=\"key\" style=\"background:{}\"></span>{}",
            colour(position),
            Escaped(name)
        )?;
    }
    writeln!(out, "</p>")
}

fn colour(position: usize) -> &'static str {
    COLOURS[position % COLOURS.len()]
}

fn begin(out: &mut impl Write, most: i64, timeline: &Timeline, length: usize) -> io::Result<()> {
    let clock = |time: i64| {
        let time = jiff::Timestamp::from_nanosecond(i128::from(time)).unwrap_or_default();
        time.strftime("%H:%M:%S").to_string()
    };
    let length = i64::try_from(length).unwrap_or_default();
    let end = timeline.start.saturating_add(timeline.step.saturating_mul(length));
    writeln!(
        out,
        "<div class=\"wide\"><svg viewBox=\"0 0 {WIDTH} {}\" role=\"img\"><text x=\"0\" \
         y=\"12\">{most}</text><text x=\"0\" y=\"{HEIGHT}\">0</text><text x=\"{LEFT}\" \
         y=\"{}\">{}</text><text x=\"{WIDTH}\" y=\"{1}\" text-anchor=\"end\">{} UTC</text><line \
         x1=\"{LEFT}\" y1=\"{HEIGHT}\" x2=\"{WIDTH}\" y2=\"{HEIGHT}\" stroke=\"#888\"/>",
        HEIGHT + 22.0,
        HEIGHT + 16.0,
        clock(timeline.start),
        clock(end)
    )
}

/// A number over time.
#[expect(clippy::cast_precision_loss, reason = "coordinates")]
fn level(out: &mut impl Write, changes: &Timeline, whole: &Timeline) -> io::Result<()> {
    let Some(points) = changes.series.values().next() else {
        return writeln!(out, "<p>None.</p>");
    };
    let mut now = 0;
    let levels: Vec<i64> = points
        .iter()
        .map(|change| {
            now += change;
            now
        })
        .collect();
    // Sockets leave TIME_WAIT long after the last event of a short trace.
    let end = whole
        .start
        .saturating_add(whole.step.saturating_mul(i64::try_from(whole.length()).unwrap_or_default()));
    let until = usize::try_from((end - changes.start) / changes.step.max(1)).unwrap_or_default() + 1;
    let length = until.clamp(2, levels.len());
    let most = levels[..length].iter().copied().max().unwrap_or_default().max(1);
    begin(out, most, changes, length)?;
    let width = (WIDTH - LEFT) / (length - 1) as f64;
    let height = |level: i64| HEIGHT - level.max(0) as f64 * HEIGHT / most as f64;
    let mut path = format!("M{LEFT},{HEIGHT}");
    for (index, level) in levels[..length].iter().enumerate() {
        let _ = write!(path, "L{:.1},{:.1}", LEFT + index as f64 * width, height(*level));
    }
    writeln!(
        out,
        "<path d=\"{path}L{WIDTH},{HEIGHT}Z\" fill=\"#4e79a7\" fill-opacity=\".5\" \
         stroke=\"#4e79a7\"/></svg></div>"
    )
}

/// A frame and its callees.
#[derive(Default)]
struct Node {
    count: u64,
    calls: BTreeMap<String, Node>,
}

/// A frame's height, and the width below which it is left out.
const ROW: f64 = 17.0;
const THIN: f64 = 2.0;

/// A frame that is drawn: its name, the number of its stacks, and its place.
struct Flame<'a> {
    name: &'a str,
    count: u64,
    left: f64,
    top: f64,
    width: f64,
}

/// Lays out the callees of a frame below it, side by side.
#[expect(clippy::cast_precision_loss, reason = "coordinates")]
fn lay_out<'a>(node: &'a Node, mut left: f64, top: f64, width: f64, frames: &mut Vec<Flame<'a>>) {
    for (name, callee) in &node.calls {
        let share = width * callee.count as f64 / node.count as f64;
        if share >= THIN {
            frames.push(Flame { name, count: callee.count, left, top, width: share });
            lay_out(callee, left, top + ROW, share, frames);
        }
        left += share;
    }
}

fn flames(out: &mut impl Write, pictures: &Pictures) -> io::Result<()> {
    let mut root = Node::default();
    for (names, count) in &pictures.stacks {
        let mut node = &mut root;
        node.count += count;
        for name in names {
            node = node.calls.entry(name.clone()).or_default();
            node.count += count;
        }
    }
    if root.count == 0 {
        return writeln!(out, "<p>No stacks in these lines.</p>");
    }
    let mut frames = Vec::new();
    lay_out(&root, 0.0, 0.0, WIDTH, &mut frames);
    let height = frames.iter().map(|frame| frame.top).fold(0.0, f64::max) + ROW;
    writeln!(
        out,
        "<div class=\"wide\"><svg class=\"flames\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\"><g \
         class=\"flame\">"
    )?;
    frames.iter().try_for_each(|frame| flame(out, frame, root.count))?;
    writeln!(out, "</g></svg></div>")
}

fn flame(out: &mut impl Write, frame: &Flame<'_>, total: u64) -> io::Result<()> {
    let Flame { name, count, left, top, width } = frame;
    let hue =
        name.bytes().fold(7_u32, |hash, byte| hash.wrapping_mul(31).wrapping_add(u32::from(byte))) % 40 + 15;
    write!(
        out,
        "<g><title>{0} ({count} of {total})</title><rect x=\"{left:.2}\" y=\"{top:.1}\" \
         width=\"{width:.2}\" height=\"{1}\" fill=\"hsl({hue},85%,68%)\" stroke=\"#fff\" \
         stroke-width=\".5\"/>",
        Escaped(name),
        ROW - 1.0
    )?;
    // The approximate number of letters that fit.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a few letters")]
    let room = (width / 6.6) as usize;
    if room >= 3 {
        let mut short: String = name.chars().take(room).collect();
        if short.len() < name.len() {
            short.pop();
            short.push('…');
        }
        write!(out, "<text x=\"{:.2}\" y=\"{:.1}\">{}</text>", left + 2.0, top + 12.0, Escaped(&short))?;
    }
    writeln!(out, "</g>")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnose::{Diagnosis, input::Input};

    #[test]
    fn a_page_of_nothing_has_no_diagrams() {
        let mut page = Vec::new();
        write(&mut page, &[], Totals::default(), &Pictures::default()).expect("memory");
        let page = String::from_utf8(page).expect("UTF-8");
        assert!(page.matches("<p>None.</p>").count() == 4 && !page.contains("<svg"), "{page}");
    }

    #[test]
    fn frames_are_as_wide_as_they_are_frequent() {
        let mut pictures = Pictures::default();
        let stack = |names: &[&str]| names.iter().copied().map(str::to_owned).collect::<Vec<_>>();
        pictures.stacks.insert(stack(&["nginx", "a", "b"]), 300);
        pictures.stacks.insert(stack(&["nginx", "c"]), 100);
        // It is too thin to be seen, and would make the page long.
        let deep: Vec<&str> = ["d"].into_iter().cycle().take(60).collect();
        pictures.stacks.insert(stack(&deep), 0);
        let mut svg = Vec::new();
        flames(&mut svg, &pictures).expect("memory");
        let svg = String::from_utf8(svg).expect("UTF-8");
        assert!(svg.contains("viewBox=\"0 0 960 51\""), "{svg}");
        for frame in [
            "<title>nginx (400 of 400)</title><rect x=\"0.00\" y=\"0.0\" width=\"960.00\"",
            "<title>a (300 of 400)</title><rect x=\"0.00\" y=\"17.0\" width=\"720.00\"",
            "<title>b (300 of 400)</title><rect x=\"0.00\" y=\"34.0\" width=\"720.00\"",
            "<title>c (100 of 400)</title><rect x=\"720.00\" y=\"17.0\" width=\"240.00\"",
        ] {
            assert!(svg.contains(frame), "{frame} is not in {svg}");
        }
        assert!(!svg.contains("<title>d"), "{svg}");
    }

    #[test]
    fn text_from_outside_stays_text() {
        let line =
            r#"{"event":"close","time":"2026-03-01T12:00:00Z","seq":1,"closed_by":"local","ended":"fin",
            "process":{"pid":1,"comm":"<script>\"'&\u0000"},"connection":{},
            "stack":{"user":[{"symbol":"a<b>","module":null}],"kernel":null}}"#
                .replace('\n', "");
        let mut input = Input::of(&[&line]);
        let (mut diagnosis, mut pictures) = (Diagnosis::default(), Pictures::default());
        input
            .read(|observation, source| {
                diagnosis.add(observation, source);
                pictures.add(observation);
            })
            .expect("memory");
        assert_eq!(input.broken.count, 0, "{:?}", input.broken.first);
        let mut page = Vec::new();
        write(&mut page, &[], diagnosis.totals(), &pictures).expect("memory");
        let page = String::from_utf8(page).expect("UTF-8");
        assert!(page.contains("&lt;script&gt;&quot;&#39;&amp;\\u{0} (1 of 1)"), "{page}");
        assert!(page.contains("a&lt;b&gt;") && !page.contains("<script"), "{page}");
        assert!(!page.contains("http:") && !page.contains("https:") && !page.contains("src="), "{page}");
    }
}
