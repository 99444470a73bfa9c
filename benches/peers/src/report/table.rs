//! A table: which cases it needs, what they measured round by round, and its text.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::Measured;
use super::unit::{Unit, digits};
use crate::case::Case;
use crate::stats::median;

/// This crate's row, which the others are divided by.
pub(crate) const OURS: &str = "tokio-shm";

pub(crate) struct Table {
    /// As `--only` takes it, and the name of its place in the document.
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    pub(crate) unit: Unit,
    pub(crate) jobs: Vec<Job>,
    rows: Vec<String>,
    columns: Vec<String>,
    cells: BTreeMap<(usize, usize), Cell>,
    notes: Vec<String>,
}

/// A case and what its rounds measured, by the name of the figure.
pub(crate) struct Job {
    pub(crate) case: Case,
    /// `None` for a round that failed, so that rounds stay side by side.
    pub(crate) rounds: Vec<Option<Vec<Measured>>>,
}

enum Cell {
    Figure { job: usize, metric: &'static str, tail: Option<&'static str>, bytes: usize },
    Missing { note: usize },
}

impl Table {
    pub(crate) fn new(name: &'static str, title: &'static str, unit: Unit) -> Self {
        let (jobs, rows, columns, notes) = Default::default();
        Self { name, title, unit, jobs, rows, columns, cells: BTreeMap::new(), notes }
    }

    /// A case that fills one cell.
    pub(crate) fn add(&mut self, row: &str, column: &str, case: Case) {
        let (metric, tail) = match self.unit {
            Unit::Rate => ("rate", None),
            _ => ("ns", Some("p99_ns")),
        };
        self.add_figures(case, &[(row, column, metric)]);
        let place = self.place(row, column);
        if let Some(Cell::Figure { tail: of_cell, .. }) = self.cells.get_mut(&place) {
            *of_cell = tail;
        }
    }

    /// A case that fills several cells: row, column, name of the figure.
    pub(crate) fn add_figures(&mut self, case: Case, figures: &[(&str, &str, &'static str)]) {
        let bytes = case.size;
        let job = self.jobs.len();
        self.jobs.push(Job { case, rounds: Vec::new() });
        for (row, column, metric) in figures {
            let place = self.place(row, column);
            self.cells.insert(place, Cell::Figure { job, metric, tail: None, bytes });
        }
    }

    /// A cell that a peer cannot fill, and why.
    pub(crate) fn missing(&mut self, row: &str, column: &str, why: &str) {
        let note = self.notes.iter().position(|note| note == why).unwrap_or_else(|| {
            self.notes.push(why.to_owned());
            self.notes.len() - 1
        });
        let place = self.place(row, column);
        self.cells.insert(place, Cell::Missing { note });
    }

    fn place(&mut self, row: &str, column: &str) -> (usize, usize) {
        let index = |names: &mut Vec<String>, name: &str| {
            names.iter().position(|known| known == name).unwrap_or_else(|| {
                names.push(name.to_owned());
                names.len() - 1
            })
        };
        (index(&mut self.rows, row), index(&mut self.columns, column))
    }

    pub(crate) fn rows(&self) -> &[String] {
        &self.rows
    }

    pub(crate) fn columns(&self) -> &[String] {
        &self.columns
    }

    /// The median over the rounds.
    pub(crate) fn median(&self, row: &str, column: &str) -> Option<f64> {
        let mut rounds: Vec<_> = self.rounds(row, column)?.into_iter().flatten().collect();
        (!rounds.is_empty()).then(|| median(&mut rounds))
    }

    /// How many times `below` a cell is: the median over the rounds that have both.
    pub(crate) fn ratio(&self, row: &str, column: &str, below: (&str, &str)) -> Option<f64> {
        let (over, under) = (self.rounds(row, column)?, self.rounds(below.0, below.1)?);
        let both = over.into_iter().zip(under).filter_map(|(over, under)| Some(over? / under?));
        let mut ratios: Vec<_> = both.filter(|ratio| ratio.is_finite()).collect();
        (!ratios.is_empty()).then(|| median(&mut ratios))
    }

    fn rounds(&self, row: &str, column: &str) -> Option<Vec<Option<f64>>> {
        let Cell::Figure { job, metric, .. } = self.cell(row, column)? else { return None };
        Some(self.jobs[*job].figures(metric))
    }

    fn cell(&self, row: &str, column: &str) -> Option<&Cell> {
        let row = self.rows.iter().position(|known| known == row)?;
        let column = self.columns.iter().position(|known| known == column)?;
        self.cells.get(&(row, column))
    }

    /// In Markdown, with its notes.
    pub(crate) fn markdown(&self) -> String {
        let mut text =
            format!("| | {} |\n|---|{}\n", self.columns.join(" | "), "---|".repeat(self.columns.len()));
        for row in &self.rows {
            let cells: Vec<_> = self.columns.iter().map(|column| self.show(row, column)).collect();
            let _ = writeln!(text, "| {row} | {} |", cells.join(" | "));
        }
        for (number, note) in self.notes.iter().enumerate() {
            let _ = write!(text, "\n{}. {note}.", number + 1);
        }
        text.trim_end().to_owned() + "\n"
    }

    fn show(&self, row: &str, column: &str) -> String {
        let (job, tail, bytes) = match self.cell(row, column) {
            None => return "-".into(),
            Some(Cell::Missing { note }) => return format!("- ({})", note + 1),
            Some(Cell::Figure { job, tail, bytes, .. }) => (&self.jobs[*job], tail, *bytes),
        };
        let Some(value) = self.median(row, column) else { return "failed".into() };
        let mut text = self.unit.show(value);
        if self.unit == Unit::Rate {
            let _ = write!(text, ", {} GB/s", digits(value * bytes as f64 / 1e9));
        }
        if let Some(tail) = tail {
            let mut tails: Vec<_> = job.figures(tail).into_iter().flatten().collect();
            let _ = write!(text, ", p99 {}", self.unit.show(median(&mut tails)));
        }
        if row != OURS
            && let Some(ratio) = self.ratio(row, column, (OURS, column))
        {
            let _ = write!(text, ", ×{}", digits(ratio));
        }
        text
    }
}

impl Job {
    fn figures(&self, metric: &str) -> Vec<Option<f64>> {
        let of = |round: &Vec<Measured>| round.iter().find(|figure| figure.name == metric).map(|f| f.value);
        self.rounds.iter().map(|round| round.as_ref().and_then(of)).collect()
    }
}
