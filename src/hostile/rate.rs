//! What hostile subscribers, in a process of their own, cost the others: the rate of a bystander with and without them.
//!
//! Rounds with and without take turns, and the best of each is compared: whatever else the machine does slows both. A process
//! that merely burns a core is measured too, for that much any process may take. What a peer does to its own link is tested
//! elsewhere.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::process::{Child, Command, Stdio};

use super::publisher::Attacked;
use super::*;
use crate::sys::testing::{is_alone, run_alone};

const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_millis(100);
/// How much of the rate must be left, of the best round each. Far less than there is on a machine of its own, because tests
/// share theirs.
const LEAST: f64 = 0.02;
/// Of those that make the publisher set up links as fast as it can: it must not come to a halt.
const SOME: f64 = 0.005;

/// What a hostile process does until it is killed, and what it must leave.
type Kind = (&'static str, fn(&dyn Fn() -> Wire), f64);

const KINDS: &[Kind] = &[
    (
        "burns a core, and has no link",
        |_| {
            loop {
                std::hint::spin_loop();
            }
        },
        LEAST,
    ),
    ("never reads, and loses the newest", |connect| never_reads(connect, OnFullWire::DropNewest), LEAST),
    ("never reads, and loses the oldest", |connect| never_reads(connect, OnFullWire::DropOldest), LEAST),
    (
        "connects without end",
        |connect| {
            loop {
                drop(connect());
            }
        },
        SOME,
    ),
    (
        "connects and greets without end",
        |connect| {
            loop {
                connect().say(hello(64, OnFullWire::DropNewest), &[]);
            }
        },
        SOME,
    ),
    (
        "is refused without end",
        |connect| {
            loop {
                let wire = connect();
                if wire.say_raw(b"garbage!garbage!", &[]) {
                    while wire.hear().is_some() {}
                }
            }
        },
        LEAST,
    ),
    (
        "scribbles over its page",
        |connect| {
            let mut state = 1;
            loop {
                let guest = Guest::on(connect(), 64, OnFullWire::DropOldest);
                for _ in 0..10_000 {
                    let view = guest.view();
                    view.scribble(random(&mut state) as usize % view.words(), lie(&mut state));
                }
            }
        },
        LEAST,
    ),
    (
        "rings, and has itself rung for, without end",
        |connect| {
            let guest = Guest::on(connect(), 64, OnFullWire::DropOldest);
            loop {
                guest.credit.ring();
                // The flags of both bells.
                guest.view().scribble(DATA_ARMED, 1);
                guest.view().scribble(CREDIT_ARMED, 1);
            }
        },
        LEAST,
    ),
];

fn never_reads(connect: &dyn Fn() -> Wire, on_full: OnFullWire) {
    let _guest = Guest::on(connect(), 64, on_full);
    loop {
        std::thread::park();
    }
}

/// A process that does one of [`KINDS`] until dropped.
struct Hostile(Child);

impl Hostile {
    fn start(kind: usize, this: &Attacked) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "hostile::rate::child_hostile", "--ignored", "--nocapture", "--test-threads=1"])
            .env(KIND, kind.to_string())
            .env(PUBLISHER, this.publisher.id().to_string())
            .env(PLACE, this.place.0.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let this = Self(child);
        assert!(stdout.lines().any(|line| line.unwrap().contains("begun")), "it has begun");
        this
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const KIND: &str = "TOKIO_SHM_TEST_KIND";
const PUBLISHER: &str = "TOKIO_SHM_TEST_PUBLISHER";
const PLACE: &str = "TOKIO_SHM_TEST_PLACE";

#[test]
#[ignore = "the hostile process of hostile_process_leaves_bystanders_their_rate"]
fn child_hostile() {
    let Ok(kind) = std::env::var(KIND) else { return };
    // It goes with its parent, whatever becomes of that one.
    std::thread::spawn(|| {
        let _ = std::io::stdin().read(&mut [0]);
        std::process::exit(0);
    });
    let publisher = std::env::var(PUBLISHER).unwrap().parse().unwrap();
    let path = std::env::var(PLACE).unwrap();
    let runtime = RuntimeDir::resolve(Some(path.as_ref()), crate::access::Access::default()).unwrap();
    let topic = TopicDir::open(&runtime, &TopicName::new("t").unwrap()).unwrap();
    let connect = || {
        loop {
            // Fails where too many are in line.
            if let Ok(connection) = topic.connect(publisher) {
                return Wire(connection);
            }
        }
    };
    writeln!(std::io::stdout(), "begun").unwrap();
    KINDS[kind.parse::<usize>().unwrap()].1(&connect);
}

/// Messages that a bystander gets in a second.
fn rate(this: &mut Attacked) -> f64 {
    let mut run = |time: Duration| {
        let (began, mut messages) = (Instant::now(), 0);
        while began.elapsed() < time {
            this.exchange_some(10);
            messages += 10;
        }
        f64::from(messages) / began.elapsed().as_secs_f64()
    };
    run(ROUND / 4);
    run(ROUND)
}

#[test]
fn hostile_process_leaves_bystanders_their_rate() {
    let printed = run_alone("hostile::rate::child_rate");
    let figures = printed.lines().filter(|line| line.starts_with("rate:"));
    writeln!(std::io::stdout(), "\n{}", figures.collect::<Vec<_>>().join("\n")).unwrap();
}

#[test]
#[ignore = "the measuring half of hostile_process_leaves_bystanders_their_rate"]
fn child_rate() {
    if !is_alone() {
        return;
    }
    for (kind, (name, _, least)) in KINDS.iter().enumerate() {
        let mut this = Attacked::new();
        let (mut without, mut with) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            without.push(rate(&mut this));
            let hostile = Hostile::start(kind, &this);
            with.push(rate(&mut this));
            drop(hostile);
            wait_until("it is gone", || this.publisher.subscriber_count() == 1);
        }
        this.finish();
        for rates in [&mut without, &mut with] {
            rates.sort_by(f64::total_cmp);
        }
        let (best, most) = (with[ROUNDS - 1], without[ROUNDS - 1]);
        let (median, usual) = (with[ROUNDS / 2], without[ROUNDS / 2]);
        writeln!(
            std::io::stdout(),
            "\nrate: {name}: best {:.1} of {:.0} thousand messages/s ({:.1} %), median {:.1} of {:.0} ({:.1} %)",
            best / 1e3,
            most / 1e3,
            100.0 * best / most,
            median / 1e3,
            usual / 1e3,
            100.0 * median / usual,
        )
        .unwrap();
        assert!(best > least * most, "{name}: {with:?} with it, {without:?} without");
    }
}
