//! Line charts as SVG.
//!
//! By hand: a chart of a few lines is a hundred lines of text, and a plotting crate would bring
//! fonts, bitmaps and a dozen dependencies into a workspace that has no other use for them.

use std::fmt::Write as _;

/// A line.
#[derive(Clone, Debug)]
pub struct Line {
    /// What the legend says.
    pub name: String,
    /// One value for each of the chart's positions.
    pub values: Vec<f64>,
}

/// A chart of several panels side by side, with one legend and one scale.
#[derive(Clone, Debug)]
pub struct Chart {
    /// Above.
    pub title: String,
    /// Below each panel.
    pub across: String,
    /// Names of the positions from left to right.
    pub positions: Vec<String>,
    /// Name and lines of each panel. Every panel has the same lines.
    pub panels: Vec<(String, Vec<Line>)>,
}

const COLOURS: [&str; 6] = ["#888888", "#d98c00", "#0a7d5a", "#f0c060", "#70c8a8", "#2050c0"];
const WIDTH: f64 = 330.0;
const HEIGHT: f64 = 200.0;
const LEFT: f64 = 60.0;
const TOP: f64 = 50.0;
const GAP: f64 = 30.0;

impl Chart {
    /// The chart as a file.
    pub fn svg(&self) -> String {
        let lines = || self.panels.iter().flat_map(|(_, lines)| lines);
        let highest = lines().flat_map(|line| &line.values).copied().fold(0.0, f64::max);
        let step = step(highest);
        let most = (highest / step).ceil().max(1.0) * step;
        let width = LEFT + (WIDTH + GAP) * self.panels.len() as f64 + 90.0;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{}\" \
             font-family=\"sans-serif\" font-size=\"11\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
            TOP + HEIGHT + 50.0
        );
        text(&mut svg, LEFT, 18.0, "start", &self.title);
        for (index, (name, lines)) in self.panels.iter().enumerate() {
            let left = LEFT + (WIDTH + GAP) * index as f64;
            self.panel(&mut svg, left, name, lines, (step, most));
        }
        let legend = LEFT + (WIDTH + GAP) * self.panels.len() as f64;
        let names = self.panels.first().map(|(_, lines)| lines.as_slice()).unwrap_or_default();
        for (index, line) in names.iter().enumerate() {
            let y = TOP + 10.0 + 18.0 * index as f64;
            path(&mut svg, index, &[(legend, y), (legend + 18.0, y)]);
            text(&mut svg, legend + 24.0, y + 4.0, "start", &line.name);
        }
        svg.push_str("</svg>\n");
        svg
    }

    fn panel(
        &self,
        svg: &mut String,
        left: f64,
        name: &str,
        lines: &[Line],
        (step, most): (f64, f64),
    ) {
        let y = |value: f64| TOP + HEIGHT * (1.0 - value / most);
        let x = |position: usize| {
            let last = self.positions.len().saturating_sub(1).max(1);
            left + 20.0 + (WIDTH - 40.0) * position as f64 / last as f64
        };
        text(svg, left + WIDTH / 2.0, TOP - 10.0, "middle", name);
        let mut mark = 0.0;
        while mark <= most * 1.001 {
            let at = y(mark);
            _ = writeln!(
                svg,
                "<path d=\"M{left:.1} {at:.1}h{WIDTH}\" stroke=\"#dddddd\" fill=\"none\"/>"
            );
            if left == LEFT {
                let digits = if step < 1.0 { 2 } else { 0 };
                text(svg, left - 6.0, at + 4.0, "end", &format!("{mark:.digits$}"));
            }
            mark += step;
        }
        for (position, label) in self.positions.iter().enumerate() {
            text(svg, x(position), TOP + HEIGHT + 16.0, "middle", label);
        }
        text(svg, left + WIDTH / 2.0, TOP + HEIGHT + 34.0, "middle", &self.across);
        for (index, line) in lines.iter().enumerate() {
            let points: Vec<(f64, f64)> =
                line.values.iter().enumerate().map(|(at, value)| (x(at), y(*value))).collect();
            path(svg, index, &points);
        }
    }
}

/// A round distance between marks, so that there are four to ten.
fn step(highest: f64) -> f64 {
    let power = 10f64.powf(highest.max(1e-9).log10().floor());
    [0.1, 0.2, 0.5, 1.0]
        .map(|part| part * power)
        .into_iter()
        .find(|step| highest / step <= 8.0)
        .unwrap_or(2.0 * power)
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, words: &str) {
    let words = words.replace('&', "&amp;").replace('<', "&lt;");
    _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{words}</text>");
}

fn path(svg: &mut String, index: usize, points: &[(f64, f64)]) {
    let colour = COLOURS[index % COLOURS.len()];
    let places: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1} {y:.1}")).collect();
    _ = writeln!(
        svg,
        "<path d=\"M{}\" stroke=\"{colour}\" stroke-width=\"2\" fill=\"none\"/>",
        places.join("L")
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chart_has_every_line_in_every_panel_and_in_the_legend() {
        let lines = || {
            ["a", "b<c"]
                .map(|name| Line { name: name.to_owned(), values: vec![1.0, 35.0] })
                .to_vec()
        };
        let chart = Chart {
            title: "title".to_owned(),
            across: "nodes".to_owned(),
            positions: vec!["10".to_owned(), "100".to_owned()],
            panels: vec![("one".to_owned(), lines()), ("two".to_owned(), lines())],
        };
        let svg = chart.svg();
        assert_eq!(svg.matches("stroke-width=\"2\"").count(), 6);
        assert!(svg.contains(">b&lt;c</text>") && svg.ends_with("</svg>\n"));
        // 35 of 35 is at the top mark, which is 35: marks are 5 apart.
        assert!(svg.contains(&format!("L370.0 {TOP:.1}\"")), "{svg}");
    }

    #[test]
    fn marks_are_round_and_few() {
        let steps = [0.0004, 0.9, 1.0, 35.0, 81.0, 1e9].map(step);
        for (step, right) in steps.into_iter().zip([0.000_05, 0.2, 0.2, 5.0, 20.0, 2e8]) {
            assert!((step / right - 1.0).abs() < 1e-9, "{step}, not {right}");
        }
    }
}
