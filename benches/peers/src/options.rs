//! The command line.

use std::path::PathBuf;

const USAGE: &str = "\
usage: tokio-shm-peers [--quick] [--only NAME]... [--rounds N] [--docs DIR]

  --quick      shortened, prints only
  --only NAME  one of the tables, by its name in docs/benchmarks.md; may be given more than once
  --rounds N   how often each case is run, all of them in turn; default 5, quick 2
  --docs DIR   where benchmarks.md stands and the plots go; default docs/ of this repository";

#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) quick: bool,
    /// All, if empty.
    pub(crate) only: Vec<String>,
    pub(crate) rounds: usize,
    /// `None`: nothing is written.
    pub(crate) docs: Option<PathBuf>,
}

impl Options {
    /// # Errors
    ///
    /// What is wrong with the command line, or how it is used.
    pub(crate) fn parse() -> Result<Self, Box<dyn std::error::Error>> {
        use lexopt::prelude::*;
        let (mut quick, mut only, mut rounds, mut docs) = (false, Vec::new(), None, None);
        let mut parser = lexopt::Parser::from_env();
        while let Some(argument) = parser.next()? {
            match argument {
                Long("quick") => quick = true,
                Long("only") => only.push(parser.value()?.string()?),
                Long("rounds") => rounds = Some(parser.value()?.parse()?),
                Long("docs") => docs = Some(PathBuf::from(parser.value()?)),
                Long("help") | Short('h') => return Err(USAGE.into()),
                other => return Err(format!("{}\n\n{USAGE}", other.unexpected()).into()),
            }
        }
        let repository = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs");
        let docs = docs.or_else(|| (!quick).then(|| repository.into()));
        Ok(Self { quick, only, rounds: rounds.unwrap_or(if quick { 2 } else { 5 }).max(1), docs })
    }

    pub(crate) fn wants_all(&self) -> bool {
        self.only.is_empty()
    }

    pub(crate) fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == name)
    }
}
