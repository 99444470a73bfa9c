//! Which tables there are, who takes part in each, and why somebody does not.

use crate::case::{Case, Mode, Work};
use crate::options::Options;
use crate::report::table::Table;
use crate::report::unit::{Unit, size};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// Those that were asked for.
pub(crate) fn tables(options: &Options) -> Vec<Table> {
    let all = [awake];
    let mut tables: Vec<_> = all.iter().map(|table| table()).filter(|table| options.wants(table.name)).collect();
    if options.quick {
        for job in tables.iter_mut().flat_map(|table| &mut table.jobs) {
            job.case.effort_ms /= 3;
        }
    }
    tables
}

/// One hop, both sides never sleeping.
fn awake() -> Table {
    let mut table = Table::new("awake", "One hop, two processes on two cores, both awake", Unit::Time);
    for peer in ["tokio-shm", "iceoryx2", "floor: spin"] {
        for bytes in [64, 4 * KIB, 64 * KIB, MIB, 16 * MIB] {
            let case = Case { depth: 2, ..Case::new(Work::Hop, peer, Mode::Awake, bytes) };
            table.add(peer, &size(bytes), case);
        }
    }
    table
}
