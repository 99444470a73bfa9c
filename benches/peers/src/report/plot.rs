//! A table as lines over its columns: SVG, both axes logarithmic.

use std::error::Error;
use std::path::Path;

use plotters::prelude::*;

use super::table::Table;
use super::unit::Unit;

/// What a plot is of: columns become numbers, figures are scaled.
pub(crate) struct Plot<'a> {
    pub(crate) table: &'a Table,
    pub(crate) across: &'static str,
    pub(crate) up: &'static str,
    /// A column's place on the axis.
    pub(crate) x: fn(&str) -> Option<f64>,
    /// A figure's, with its column's.
    pub(crate) y: fn(f64, f64) -> f64,
}

const COLOURS: [RGBColor; 10] = [
    RGBColor(214, 39, 40),
    RGBColor(31, 119, 180),
    RGBColor(44, 160, 44),
    RGBColor(255, 127, 14),
    RGBColor(148, 103, 189),
    RGBColor(140, 86, 75),
    RGBColor(227, 119, 194),
    RGBColor(23, 190, 207),
    RGBColor(188, 189, 34),
    RGBColor(127, 127, 127),
];

/// Draws it, if anything of it was measured.
///
/// # Errors
///
/// The file cannot be written.
pub(crate) fn draw(plot: &Plot<'_>, file: &Path) -> Result<(), Box<dyn Error>> {
    let lines: Vec<_> = plot.table.rows().iter().map(|row| (row, points(plot, row))).collect();
    let lines: Vec<_> = lines.into_iter().filter(|(_, points)| points.len() > 1).collect();
    let all = || lines.iter().flat_map(|(_, points)| points);
    let span = |values: &mut dyn Iterator<Item = f64>| {
        values.fold((f64::INFINITY, 0.0), |(low, high): (f64, f64), value| (low.min(value), high.max(value)))
    };
    let (left, right) = span(&mut all().map(|point| point.0));
    let (bottom, top) = span(&mut all().map(|point| point.1));
    if lines.is_empty() {
        return Ok(());
    }

    let root = SVGBackend::new(file, (900, 540)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(plot.table.title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(70)
        .build_cartesian_2d((left * 0.9..right * 1.1).log_scale(), (bottom * 0.7..top * 1.4).log_scale())?;
    chart
        .configure_mesh()
        .light_line_style(RGBColor(240, 240, 240))
        .x_desc(plot.across)
        .y_desc(plot.up)
        .label_style(("sans-serif", 15))
        .x_label_formatter(&|value| format!("{value}"))
        .y_label_formatter(&|value| format!("{value}"))
        .draw()?;
    for ((row, points), colour) in lines.iter().zip(COLOURS.iter().cycle()) {
        let style = colour.stroke_width(if row.starts_with(super::table::OURS) { 3 } else { 2 });
        chart
            .draw_series(LineSeries::new(points.iter().copied(), style).point_size(3))?
            .label(row.as_str())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .label_font(("sans-serif", 15))
        .background_style(WHITE.mix(0.85))
        .border_style(RGBColor(200, 200, 200))
        .draw()?;
    root.present()?;
    Ok(())
}

fn points(plot: &Plot<'_>, row: &str) -> Vec<(f64, f64)> {
    let point = |column: &String| {
        let x = (plot.x)(column)?;
        Some((x, (plot.y)(plot.table.median(row, column)?, x)))
    };
    plot.table.columns().iter().filter_map(point).collect()
}

/// The plots of a run, by the names of their tables.
pub(crate) fn of(table: &Table) -> Option<Plot<'_>> {
    let microseconds: fn(f64, f64) -> f64 = |nanoseconds, _| nanoseconds / 1e3;
    match (table.name, table.unit) {
        ("awake", _) => Some(Plot {
            table,
            across: "bytes a message",
            up: "µs a hop",
            x: super::unit::parse_size,
            y: microseconds,
        }),
        ("stream", Unit::Rate) => Some(Plot {
            table,
            across: "bytes a message",
            up: "GB/s",
            x: super::unit::parse_size,
            y: |rate, size| rate * size / 1e9,
        }),
        ("fan-out", _) => Some(Plot {
            table,
            across: "subscribers",
            up: "µs until all have read",
            x: |column| column.split(' ').next()?.parse().ok(),
            y: microseconds,
        }),
        _ => None,
    }
}
