//! Where a run took place, and which versions took part.

use std::fs;

use rustix::system::uname;

use crate::options::Options;

/// Peers whose version counts, as the lock file names them.
const PEERS: [&str; 6] = ["tokio-shm", "iceoryx2", "ringfire", "zenoh", "ipc-channel", "tokio"];

const LOCK: &str = include_str!("../../Cargo.lock");

/// In Markdown.
pub(crate) fn markdown(options: &Options) -> String {
    let uname = uname();
    let versions: Vec<_> =
        PEERS.iter().filter_map(|name| Some(format!("{name} {}", version(name)?))).collect();
    format!(
        "{cpu}, {cores} cores; Linux {kernel}; {date}; medians of {rounds} rounds{shortened}.\n{versions}; {rustc}.\n",
        cpu = cpu(),
        cores = std::thread::available_parallelism().map_or(0, usize::from),
        kernel = uname.release().to_string_lossy(),
        date = date(),
        rounds = options.rounds,
        shortened = if options.quick { ", shortened" } else { "" },
        versions = versions.join(", "),
        rustc = env!("RUSTC_VERSION"),
    )
}

fn version(name: &str) -> Option<&'static str> {
    let (_, rest) = LOCK.split_once(&format!("name = \"{name}\"\nversion = \""))?;
    Some(rest.split_once('"')?.0)
}

fn cpu() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    model.map_or("unknown CPU".into(), |(_, model)| model.to_owned())
}

/// Today in UTC, from days since 1970 (Howard Hinnant's `civil_from_days`).
fn date() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let days = (now.as_secs() / 86_400) as i64 + 719_468;
    let era = days / 146_097;
    let day_of_era = days % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year}-{month:02}-{day:02}")
}
