//! The command `tokio-shm`: for now, `tokio-shm bridge`.
//!
//! Arguments in, [`Bridge`] up, counters out; everything else is the library's.
#![allow(clippy::print_stdout, clippy::print_stderr)] // it is a command

use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

use lexopt::prelude::*;
use tokio::signal::unix::{SignalKind, signal};
use tokio_shm::ShmPoolConfig;
use tokio_shm::bridge::{Bridge, BridgeBuilder, BridgeStats, Congestion, Direction, Route};

const HELP: &str = "\
Bridges local tokio-shm topics and zenoh key expressions.

usage: tokio-shm bridge --topic PATTERN --zenoh PATTERN [--direction both|out|in] [--full wait|drop]
                        [--topic … --zenoh … …] [options]

A * stands for one part between slashes, ** at the end for one or more; both patterns have the same ones.
    tokio-shm bridge --topic 'camera/*' --zenoh 'robot1/camera/*' --listen tcp/0.0.0.0:7447

routes (the last two belong to the --zenoh before them):
  --topic PATTERN       local topics
  --zenoh PATTERN       their zenoh key expressions
  --direction WAY       out: topics to zenoh; in: zenoh to topics; both (default)
  --full WHAT           wait: senders wait for slow receivers (default); drop: old messages are dropped and counted

zenoh:
  --listen ENDPOINT     let others connect here, e.g. tcp/0.0.0.0:7447 (more than once, if need be)
  --connect ENDPOINT    connect there: a router or another bridge (more than once, if need be)
  --config FILE         zenoh's configuration, JSON5 or YAML; how it connects is then left as it is in it
  --patience SECONDS    drop a message (counted) that a connection does not take for so long (default 30)
  --no-scouting         do not look for others on the network

this host:
  --runtime-dir DIR     where topics are (default: $TOKIO_SHM_DIR, else $XDG_RUNTIME_DIR/tokio-shm, else in the
                        temporary directory)
  --depth N             messages of a publisher that may wait for the bridge (default 64)
  --max-bytes N         shared memory of each topic that the bridge publishes to (default 268435456)
  --shared-memory N     put large messages into N bytes of shared memory that local zenoh programs read in place
  --stats SECONDS       print the counters so often

Ctrl-C or SIGTERM ends it in order. Logs: RUST_LOG=warn (default), info, debug.
";

struct Arguments {
    builder: BridgeBuilder,
    stats: Option<Duration>,
}

fn main() -> ExitCode {
    zenoh::init_log_from_env_or("warn");
    let arguments = match parse(lexopt::Parser::from_env()) {
        Ok(Some(arguments)) => arguments,
        Ok(None) => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("tokio-shm: {error}\nTry: tokio-shm --help");
            return ExitCode::from(2);
        }
    };
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprint!("tokio-shm: {error}");
            let mut source = error.source();
            while let Some(error) = source {
                eprint!(": {error}");
                source = error.source();
            }
            eprintln!();
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn run(arguments: Arguments) -> Result<(), Box<dyn Error>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let bridge = arguments.builder.start().await?;
    let locators = bridge.session().info().locators().await;
    let locators: Vec<_> = locators.iter().map(ToString::to_string).collect();
    println!(
        "bridging; zenoh listens at {}",
        if locators.is_empty() { "-".into() } else { locators.join(" ") }
    );
    let mut readings = arguments.stats.map(tokio::time::interval);
    loop {
        tokio::select! {
            interrupted = tokio::signal::ctrl_c() => { interrupted?; break; }
            _ = terminate.recv() => break,
            () = next(&mut readings) => {
                print_stats(&bridge.stats());
                if bridge.is_stopped() {
                    return Err("the bridge has stopped; the log says why".into());
                }
            }
        }
    }
    print_stats(&bridge.close().await);
    Ok(())
}

async fn next(readings: &mut Option<tokio::time::Interval>) {
    match readings {
        Some(readings) => {
            readings.tick().await;
        }
        None => std::future::pending().await,
    }
}

/// One line, `name=number` each.
fn print_stats(stats: &BridgeStats) {
    println!(
        "taken={} sent={} sent_bytes={} unheard={} failed={} lagged={} received={} injected={} injected_bytes={} \
         missed={} repeated={} damaged={} echoes={} refused={} revived={}",
        stats.taken,
        stats.sent,
        stats.sent_bytes,
        stats.unheard,
        stats.failed,
        stats.lagged,
        stats.received,
        stats.injected,
        stats.injected_bytes,
        stats.missed,
        stats.repeated,
        stats.damaged,
        stats.echoes,
        stats.refused,
        stats.revived,
    );
}

/// `None`: help was asked for.
fn parse(mut parser: lexopt::Parser) -> Result<Option<Arguments>, Box<dyn Error>> {
    match parser.next()? {
        Some(Value(command)) if command == "bridge" => {}
        Some(Short('h') | Long("help")) | None => return Ok(None),
        Some(other) => return Err(other.unexpected().into()),
    }
    let mut builder = Bridge::builder();
    let mut topic: Option<String> = None;
    let mut route: Option<Route> = None;
    let (mut stats, mut scouting) = (None, true);
    let mut config = None;
    let (mut listen, mut connect): (Vec<String>, Vec<String>) = (Vec::new(), Vec::new());
    while let Some(argument) = parser.next()? {
        match argument {
            Long("topic") => {
                if let Some(route) = route.take() {
                    builder = builder.route(route);
                }
                if let Some(before) = topic.replace(parser.value()?.string()?) {
                    return Err(format!("--topic {before:?} has no --zenoh").into());
                }
            }
            Long("zenoh") => {
                let topic = topic.take().ok_or("--zenoh comes after the --topic that it belongs to")?;
                route = Some(Route::new(&topic, &parser.value()?.string()?)?);
            }
            Long("direction") => {
                let direction = match parser.value()?.string()?.as_str() {
                    "both" => Direction::Both,
                    "out" => Direction::ToZenoh,
                    "in" => Direction::FromZenoh,
                    other => return Err(format!("--direction is both, out or in, not {other:?}").into()),
                };
                route = Some(route.ok_or("--direction comes after a --zenoh")?.direction(direction));
            }
            Long("full") => {
                let congestion = match parser.value()?.string()?.as_str() {
                    "wait" => Congestion::Wait,
                    "drop" => Congestion::Drop,
                    other => return Err(format!("--full is wait or drop, not {other:?}").into()),
                };
                route = Some(route.ok_or("--full comes after a --zenoh")?.congestion(congestion));
            }
            Long("listen") => listen.push(parser.value()?.string()?),
            Long("connect") => connect.push(parser.value()?.string()?),
            Long("config") => {
                let file = parser.value()?;
                config = Some(
                    zenoh::Config::from_file(&file)
                        .map_err(|error| format!("{}: {error}", file.display()))?,
                );
            }
            Long("no-scouting") => scouting = false,
            Long("runtime-dir") => builder = builder.runtime_dir(parser.value()?),
            Long("depth") => builder = builder.depth(parser.value()?.parse()?),
            Long("max-bytes") => {
                builder = builder.pool(ShmPoolConfig::new().max_bytes(parser.value()?.parse()?));
            }
            Long("shared-memory") => {
                builder = builder.shared_memory(ShmPoolConfig::new().max_bytes(parser.value()?.parse()?));
            }
            Long("stats") => {
                let interval = seconds(&mut parser)?.filter(|interval| !interval.is_zero());
                stats = Some(interval.ok_or("--stats must be more than no time")?);
            }
            Long("patience") => {
                builder = builder.patience(seconds(&mut parser)?.ok_or("--patience must be a time")?);
            }
            Short('h') | Long("help") => return Ok(None),
            other => return Err(other.unexpected().into()),
        }
    }
    if let Some(topic) = topic {
        return Err(format!("--topic {topic:?} has no --zenoh").into());
    }
    if let Some(route) = route {
        builder = builder.route(route);
    }
    if let Some(config) = config {
        builder = builder.config(config);
    }
    builder = builder.scouting(scouting);
    builder = listen.into_iter().fold(builder, BridgeBuilder::listen);
    builder = connect.into_iter().fold(builder, BridgeBuilder::connect);
    Ok(Some(Arguments { builder, stats }))
}

/// `None`: not a time.
fn seconds(parser: &mut lexopt::Parser) -> Result<Option<Duration>, Box<dyn Error>> {
    Ok(Duration::try_from_secs_f64(parser.value()?.parse()?).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Option<Arguments>, String> {
        parse(lexopt::Parser::from_args(line.split(' '))).map_err(|error| error.to_string())
    }

    #[test]
    fn zenoh_command_takes_routes_with_their_options() {
        let line = "bridge --topic a/* --zenoh k/a/* --direction out --full drop --topic b --zenoh k/b --stats 0.5 \
                    --listen tcp/127.0.0.1:0 --depth 8 --patience 2.5 --no-scouting";
        let arguments = parsed(line).unwrap().unwrap();
        assert_eq!(arguments.stats, Some(Duration::from_millis(500)));
        let debug = format!("{:?}", arguments.builder);
        assert!(
            debug.contains("ToZenoh") && debug.contains("Drop") && debug.contains("tcp/127.0.0.1:0"),
            "{debug}"
        );
        assert!(debug.contains("patience: Some(2.5s)"), "{debug}");
        assert!(parsed("--help").unwrap().is_none());
    }

    #[test]
    fn zenoh_command_says_what_is_wrong() {
        for (line, word) in [
            ("bridge --zenoh a", "--topic"),
            ("bridge --topic a", "no --zenoh"),
            ("bridge --topic a --topic b", "no --zenoh"),
            ("bridge --topic a* --zenoh b*", "no pattern"),
            ("bridge --topic a --zenoh b --direction up", "up"),
            ("bridge --direction out", "--zenoh"),
            ("bridge --full drop", "--zenoh"),
            ("bridge --stats 0", "--stats"),
            ("bridge --patience -1", "--patience"),
            ("bridge --what", "--what"),
            ("fly", "fly"),
        ] {
            let error = parsed(line).map(|_| ()).unwrap_err();
            assert!(error.contains(word), "{line}: {error}");
        }
    }
}
