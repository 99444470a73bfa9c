//! What was measured: how the subscriber's process tells it, and how it is printed.

use std::fmt;
use std::str::FromStr;

use hdrhistogram::Histogram;
use serde_json::{Value, json};

use crate::support::Result;

/// Nanoseconds from the end of writing a message to its receipt (for round trips: to the answer's).
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Latency {
    p50: u64,
    p99: u64,
    p99_9: u64,
    max: u64,
}

impl From<&Histogram<u64>> for Latency {
    fn from(all: &Histogram<u64>) -> Self {
        let at = |quantile| all.value_at_quantile(quantile);
        Self { p50: at(0.5), p99: at(0.99), p99_9: at(0.999), max: all.max() }
    }
}

/// What the subscriber's process has to say about one topic; a line of text on its way to the parent.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) received: u64,
    /// Messages whose content was not what it should be.
    pub(crate) wrong: u64,
    pub(crate) lagged: u64,
    pub(crate) copied_bytes: u64,
    pub(crate) latency: Latency,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { received, wrong, lagged, copied_bytes, latency } = self;
        let Latency { p50, p99, p99_9, max } = latency;
        write!(f, "{received} {wrong} {lagged} {copied_bytes} {p50} {p99} {p99_9} {max}")
    }
}

impl FromStr for Report {
    type Err = String;

    fn from_str(line: &str) -> std::result::Result<Self, String> {
        let numbers: Option<Vec<u64>> = line.split_whitespace().map(|word| word.parse().ok()).collect();
        match numbers.as_deref() {
            Some(&[received, wrong, lagged, copied_bytes, p50, p99, p99_9, max]) => {
                let latency = Latency { p50, p99, p99_9, max };
                Ok(Self { received, wrong, lagged, copied_bytes, latency })
            }
            _ => Err(format!("the subscriber's process said {line:?}")),
        }
    }
}

/// One line of the table.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) size: usize,
    /// Messages sent; the answers of round trips do not count.
    pub(crate) count: u64,
    /// Messages that the publisher counted as dropped.
    pub(crate) dropped: u64,
    pub(crate) copied_bytes: u64,
    /// From the first message sent until the last one was read.
    pub(crate) seconds: f64,
    pub(crate) report: Report,
}

impl Row {
    fn rate(&self) -> f64 {
        self.count as f64 / self.seconds
    }

    /// 10⁹ bytes a second.
    fn gigabytes(&self) -> f64 {
        self.rate() * self.size as f64 / 1e9
    }

    fn copied_bytes(&self) -> u64 {
        self.copied_bytes + self.report.copied_bytes
    }

    fn drops(&self) -> u64 {
        self.dropped.max(self.report.lagged)
    }

    /// Whether every message arrived, and arrived as it was sent.
    fn verify(&self) -> Result {
        let (name, sent, drops) = (self.name, self.count, self.drops());
        let Report { received, wrong, .. } = self.report;
        if received != sent || wrong != 0 || drops != 0 {
            return Err(
                format!("{name}: {sent} sent, {received} received, {drops} dropped, {wrong} wrong").into()
            );
        }
        Ok(())
    }

    fn as_json(&self) -> Value {
        let Latency { p50, p99, p99_9, max } = self.report.latency;
        json!({
            "name": self.name,
            "message_bytes": self.size,
            "sent": self.count,
            "received": self.report.received,
            "seconds": self.seconds,
            "messages_per_second": self.rate(),
            "gigabytes_per_second": self.gigabytes(),
            "latency_ns": { "p50": p50, "p99": p99, "p99_9": p99_9, "max": max },
            "copied_bytes": self.copied_bytes(),
            "drops": self.drops(),
            "wrong": self.report.wrong,
        })
    }

    fn as_cells(&self) -> [String; COLUMNS] {
        let microseconds = |nanoseconds| format!("{:.1}", nanoseconds as f64 / 1e3);
        let Latency { p50, p99, p99_9, max } = self.report.latency;
        [
            self.name.to_owned(),
            self.size.to_string(),
            self.count.to_string(),
            format!("{:.0}", self.rate()),
            format!("{:.2}", self.gigabytes()),
            microseconds(p50),
            microseconds(p99),
            microseconds(p99_9),
            microseconds(max),
            self.copied_bytes().to_string(),
            self.drops().to_string(),
        ]
    }
}

const COLUMNS: usize = 11;
const HEADINGS: [&str; COLUMNS] =
    ["", "bytes", "messages", "msg/s", "GB/s", "p50 µs", "p99 µs", "p99.9 µs", "max µs", "copied", "drops"];

pub(crate) fn table(rows: &[Row]) -> String {
    let mut text = line(HEADINGS.map(str::to_owned));
    for row in rows {
        text += &line(row.as_cells());
    }
    text + "\nThe times say how long after it was written a message was read. At full speed that is mostly waiting \
            in line.\n\"copied\" are the payload bytes that the library copied, in both processes.\n"
}

fn line([name, numbers @ ..]: [String; COLUMNS]) -> String {
    let numbers = numbers.map(|number| format!("{number:>9}"));
    format!("{name:16}{}\n", numbers.join(" "))
}

pub(crate) fn json(rows: &[Row]) -> String {
    json!({ "measurements": rows.iter().map(Row::as_json).collect::<Vec<_>>() }).to_string() + "\n"
}

pub(crate) fn verify(rows: &[Row]) -> Result {
    rows.iter().try_for_each(Row::verify)
}
