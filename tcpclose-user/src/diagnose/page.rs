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
         the program below, what it called above, as wide as it is frequent. Point at a frame for its \
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

impl Node {
    fn depth(&self) -> usize {
        1 + self.calls.values().map(Self::depth).max().unwrap_or_default()
    }
}

/// A frame's height, and the width below which it is left out.
const ROW: f64 = 17.0;
const THIN: f64 = 0.4;

#[expect(clippy::cast_precision_loss, reason = "coordinates")]
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
    let height = (root.depth() - 1) as f64 * ROW;
    writeln!(
        out,
        "<div class=\"wide\"><svg class=\"flames\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\"><g \
         class=\"flame\">"
    )?;
    let mut left = 0.0;
    for (name, node) in &root.calls {
        let width = node.count as f64 * WIDTH / root.count as f64;
        flame(out, name, node, &Rectangle { left, bottom: height, width, total: root.count })?;
        left += width;
    }
    writeln!(out, "</g></svg></div>")
}

struct Rectangle {
    left: f64,
    bottom: f64,
    width: f64,
    total: u64,
}

#[expect(clippy::cast_precision_loss, reason = "coordinates")]
fn flame(out: &mut impl Write, name: &str, node: &Node, place: &Rectangle) -> io::Result<()> {
    if place.width < THIN {
        return Ok(());
    }
    let hue =
        name.bytes().fold(7_u32, |hash, byte| hash.wrapping_mul(31).wrapping_add(u32::from(byte))) % 40 + 15;
    let top = place.bottom - ROW;
    write!(
        out,
        "<g><title>{0} ({1} of {2})</title><rect x=\"{3:.2}\" y=\"{top:.1}\" width=\"{4:.2}\" height=\"{5}\" \
         fill=\"hsl({hue},85%,68%)\" stroke=\"#fff\" stroke-width=\".5\"/>",
        Escaped(name),
        node.count,
        place.total,
        place.left,
        place.width,
        ROW - 1.0
    )?;
    // The approximate number of letters that fit.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a few letters")]
    let room = (place.width / 6.6) as usize;
    if room >= 3 {
        let mut short: String = name.chars().take(room).collect();
        if short.len() < name.len() {
            short.pop();
            short.push('…');
        }
        write!(
            out,
            "<text x=\"{:.2}\" y=\"{:.1}\">{}</text>",
            place.left + 2.0,
            top + 12.0,
            Escaped(&short)
        )?;
    }
    writeln!(out, "</g>")?;
    let mut left = place.left;
    for (name, called) in &node.calls {
        let width = place.width * called.count as f64 / node.count as f64;
        flame(out, name, called, &Rectangle { left, bottom: top, width, total: place.total })?;
        left += width;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnose::{Diagnosis, input::Input};

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
