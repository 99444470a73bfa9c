//! What was measured, and how it is shown.

pub(crate) mod docs;
pub(crate) mod machine;
pub(crate) mod plot;
pub(crate) mod table;
pub(crate) mod targets;
pub(crate) mod unit;

/// One figure of one run of a case.
#[derive(Debug, Clone)]
pub(crate) struct Measured {
    pub(crate) name: String,
    pub(crate) value: f64,
}

impl Measured {
    pub(crate) fn new(name: &str, value: f64) -> Self {
        Self { name: name.to_owned(), value }
    }

    /// To the suite, which reads what its processes print.
    pub(crate) fn print(&self) {
        println!("{} {}", self.name, self.value);
    }

    pub(crate) fn parse(line: &str) -> Option<Self> {
        let (name, value) = line.split_once(' ')?;
        Some(Self::new(name, value.parse().ok()?))
    }
}
