//! Loss curves as SVG pictures.

use crate::trainer::MetricLine;
use plotters::prelude::*;

const SIZE: (u32, u32) = (960, 540);
const TEXT: (&str, u32) = ("sans-serif", 16);
/// More points in a line than can be told apart are thinned out.
const MAX_POINTS: usize = 1000;
/// So few points are marked.
const MARKED_POINTS: usize = 50;
/// The colours of the lines, in turn.
const COLOURS: [RGBColor; 6] = [
    BLUE,
    RED,
    RGBColor(0, 128, 0),
    RGBColor(200, 120, 0),
    BLACK,
    MAGENTA,
];

/// A picture was asked for that cannot be drawn.
#[derive(Debug, thiserror::Error)]
#[error("cannot draw the loss curve: {0}")]
pub struct PlotError(String);

/// Draws training and validation loss over the steps. Without any line the axes are empty.
///
/// ```
/// use mtla_train::{MetricLine, ValidMetrics, loss_curve};
///
/// let valid = |step, loss| {
///     MetricLine::Valid(ValidMetrics { step, epoch: 1, loss, perplexity: f64::exp(loss) })
/// };
/// let svg = loss_curve(&[valid(10, 3.0), valid(20, 2.0)])?;
/// assert!(svg.starts_with("<svg") && svg.contains("validation"));
/// # Ok::<(), mtla_train::PlotError>(())
/// ```
///
/// # Errors
///
/// If the drawing library fails.
pub fn loss_curve(lines: &[MetricLine]) -> Result<String, PlotError> {
    let mut series = ["training", "validation"].map(|name| Curve::new(name, []));
    for line in lines {
        match line {
            MetricLine::Train(line) => series[0].points.push((line.step as f64, line.loss)),
            MetricLine::Valid(line) => series[1].points.push((line.step as f64, line.loss)),
        }
    }
    loss_curves(&series)
}

/// A line in a picture of several.
#[derive(Debug, Clone, PartialEq)]
pub struct Curve {
    /// What it is called.
    pub name: String,
    /// Step and loss.
    pub points: Vec<(f64, f64)>,
}

impl Curve {
    /// A curve through these points.
    pub fn new(name: impl Into<String>, points: impl IntoIterator<Item = (f64, f64)>) -> Self {
        Self {
            name: name.into(),
            points: points.into_iter().collect(),
        }
    }
}

/// Draws loss over steps, a line for each curve.
///
/// # Errors
///
/// If the drawing library fails.
pub fn loss_curves(curves: &[Curve]) -> Result<String, PlotError> {
    let mut svg = String::new();
    draw(&mut svg, curves).map_err(|error| PlotError(error.to_string()))?;
    Ok(svg)
}

fn draw(svg: &mut String, curves: &[Curve]) -> Result<(), Box<dyn std::error::Error>> {
    let all = || curves.iter().flat_map(|curve| &curve.points);
    let last = all().map(|p| p.0).fold(1.0, f64::max);
    let low = all()
        .map(|p| p.1)
        .fold(f64::INFINITY, f64::min)
        .min(f64::MAX);
    let high = all()
        .map(|p| p.1)
        .fold(f64::NEG_INFINITY, f64::max)
        .max(f64::MIN);
    let (low, high) = if low < high {
        (low, high)
    } else {
        (0.0, high.max(1.0))
    };
    let margin = 0.05 * (high - low);

    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .margin(16)
        .x_label_area_size(48)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..last, low - margin..high + margin)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc("step")
        .y_desc("loss (nats per token)")
        .x_label_formatter(&|step| format!("{step:.0}"))
        .label_style(TEXT)
        .axis_desc_style(TEXT)
        .draw()?;
    for (curve, colour) in curves.iter().zip(COLOURS.iter().cycle()) {
        let points = &curve.points;
        let mark = if points.len() <= MARKED_POINTS { 2 } else { 0 };
        let every = points.len().div_ceil(MAX_POINTS).max(1);
        let points = points.iter().copied().step_by(every);
        let series = LineSeries::new(points, colour.stroke_width(2)).point_size(mark);
        let legend = |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(2));
        chart.draw_series(series)?.label(&curve.name).legend(legend);
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .label_font(TEXT)
        .draw()?;
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trainer::ValidMetrics;

    fn valid(step: usize, loss: f64) -> MetricLine {
        MetricLine::Valid(ValidMetrics {
            step,
            epoch: 1,
            loss,
            perplexity: 1.0,
        })
    }

    #[test]
    fn axes_and_series_are_labelled() {
        let svg = loss_curve(&[valid(100, 4.0), valid(200, 2.0)]).unwrap();
        for text in [
            "step",
            "loss (nats per token)",
            "training",
            "validation",
            "200",
        ] {
            assert!(svg.contains(text), "{text} is missing");
        }
        assert_eq!(svg.matches("</svg>").count(), 1);
    }

    #[test]
    fn nothing_and_one_point_can_be_drawn() {
        assert!(loss_curve(&[]).unwrap().contains("</svg>"));
        let one = loss_curve(&[valid(7, 3.0)]).unwrap();
        assert!(one.contains("circle") && !one.contains("NaN") && !one.contains("inf"));
    }

    #[test]
    fn long_runs_make_no_longer_pictures() {
        let lines: Vec<_> = (1..100_000)
            .map(|step| valid(step, 1.0 / step as f64))
            .collect();
        assert!(loss_curve(&lines).unwrap().len() < 50_000);
    }
}
