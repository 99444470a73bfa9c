//! Runs what is planned, round by round with all cases in turn, and shows it.

use std::error::Error;

use crate::case::Case;
use crate::options::Options;
use crate::report::table::Table;
use crate::report::{docs, machine, plot, targets};
use crate::{plan, process, scratch};

/// # Errors
///
/// A table is asked for that is not there, or the document cannot be written. A case that fails is shown as such.
pub(crate) fn run(options: &Options) -> Result<(), Box<dyn Error>> {
    scratch::sweep();
    let mut tables = plan::tables(options)?;
    for table in &mut tables {
        for round in 0..options.rounds {
            eprintln!(
                "{}: round {} of {}, {} cases",
                table.name,
                round + 1,
                options.rounds,
                table.jobs.len()
            );
            measure(table);
        }
        println!("\n{}\n\n{}", table.title, table.markdown());
    }
    scratch::sweep();
    let machine = machine::markdown(options);
    let targets = targets::markdown(&tables);
    println!("Targets\n\n{targets}\n{machine}");
    if let Some(docs) = &options.docs {
        let document = docs.join("benchmarks.md");
        docs::replace(&document, "machine", &machine)?;
        for table in &tables {
            docs::replace(&document, table.name, &table.markdown())?;
            if let Some(plot) = plot::of(table) {
                plot::draw(&plot, &docs.join(format!("benchmarks-{}.svg", table.name)))?;
            }
        }
        // Of parts of a run there is no whole list.
        if options.wants_all() {
            docs::replace(&document, "targets", &targets)?;
        }
    }
    Ok(())
}

/// One round of a table.
fn measure(table: &mut Table) {
    for job in &mut table.jobs {
        let dir = scratch::directory();
        let case = Case { dir: dir.path().to_owned(), ..job.case.clone() };
        let measured = process::run(&case).map_err(|error| {
            eprintln!("{}, {:?}, {} bytes: {error}", case.peer, case.work, case.size);
        });
        job.rounds.push(measured.ok());
    }
}
