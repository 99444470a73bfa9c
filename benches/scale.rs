//! How the cost of a message grows with its size, with subscribers, publishers and topics, and with the depth of a link: tables in
//! Markdown, as they stand in `docs/scale.md`. `scale TABLE…` prints only those.
//!
//! One process has all publishers, another all subscribers (this binary run again), each with a current-thread runtime and a core
//! of its own. A round sends messages by the publishers in turn, every byte is written and read, and ends when all subscribers have
//! all; a row is the median of rounds, and those of all rows of a table take turns. What is idle meanwhile costs nothing, as the
//! table `idle` shows.
//!
//! Left out: latency (see `pubsub`), subscribers in processes of their own, rows for which `RLIMIT_NOFILE` is too low.
#![allow(missing_docs)]
#![allow(clippy::print_stdout, clippy::print_stderr)] // it is a command

use std::cell::Cell;
use std::env;
use std::hint::black_box;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CpuSet, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::task::{JoinSet, LocalSet};
use tokio_shm::{ShmPublisher, ShmSubscriber};

const ROUNDS: usize = 7;
/// Nothing that is waited for takes this long.
const LIMIT: Duration = Duration::from_secs(60);
const IDLE: Duration = Duration::from_secs(3);
/// Descriptors that a link takes in each process, its publisher's and subscriber's own included.
const FILES_PER_LINK: u64 = 8;

#[derive(Debug, Clone, Copy)]
struct Shape {
    topics: usize,
    /// For each topic.
    publishers: usize,
    /// For each topic.
    subscribers: usize,
    depth: u32,
    size: usize,
    /// Of a round.
    messages: usize,
}

const PLAIN: Shape =
    Shape { topics: 1, publishers: 1, subscribers: 1, depth: 64, size: 64, messages: 32_000 };

impl Shape {
    fn links(&self) -> usize {
        self.topics * self.publishers * self.subscribers
    }

    fn deliveries(&self) -> usize {
        self.messages * self.subscribers
    }
}

fn main() {
    if let Ok(words) = env::var(ROLE) {
        pin_to(1);
        return subscribe(&words);
    }
    pin_to(0);
    let maximum = getrlimit(Resource::Nofile).maximum;
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    let wanted: Vec<_> = env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let tables: [(&str, fn()); 6] = [
        // First: later this process has memory that was used before.
        ("idle", idle),
        ("payload", payload),
        ("subscribers", subscribers),
        ("publishers", publishers),
        ("depth", depth),
        ("topics", topics),
    ];
    println!("{}", machine());
    for (name, print) in tables {
        if wanted.is_empty() || wanted.iter().any(|wanted| wanted == name) {
            print();
        }
    }
}

fn payload() {
    let sizes = [64, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20];
    let shapes = sizes.map(|size| {
        let messages = ((128 << 20) / size).clamp(16, PLAIN.messages);
        (bytes(size), Shape { size, messages, ..PLAIN })
    });
    table("payload", &shapes);
}

fn subscribers() {
    let shapes = [1, 2, 4, 8, 16, 32, 64].map(|subscribers| {
        let messages = PLAIN.messages / subscribers;
        (subscribers.to_string(), Shape { subscribers, messages, ..PLAIN })
    });
    table("subscribers of a topic", &shapes);
}

fn publishers() {
    let shapes =
        [1, 2, 4, 8, 16, 32, 64].map(|publishers| (publishers.to_string(), Shape { publishers, ..PLAIN }));
    table("publishers of a topic", &shapes);
}

fn depth() {
    let shapes = [1, 8, 64, 512, 4_096, 65_536].map(|depth: u32| {
        // Of the shallowest each message is waited for.
        let messages = if depth == 1 { 2_000 } else { PLAIN.messages };
        (depth.to_string(), Shape { depth, messages, ..PLAIN })
    });
    table("depth", &shapes);
}

fn topics() {
    table("topics", &by_topics());
}

fn by_topics() -> [(String, Shape); 4] {
    [1, 10, 100, 1_000].map(|topics| (topics.to_string(), Shape { topics, ..PLAIN }))
}

/// What topics cost that have had messages, for each of them.
fn idle() {
    println!(
        "\n| idle topics | set up, each | descriptors, publisher | … subscriber | private memory, publisher | \
         … subscriber | shared memory | CPU of both, for all |"
    );
    println!("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |");
    for (name, shape) in &by_topics() {
        let before = Footprint::of(std::process::id());
        let Some(mut setup) = fits(name, *shape) else { continue };
        setup.round();
        let idle = setup.idle_cpu();
        let (ours, theirs) = (Footprint::of(std::process::id()), Footprint::of(setup.child.id()));
        let each = |all: f64| all / shape.topics as f64;
        println!(
            "| {name} | {} | {:.1} | {:.1} | {:.1} KiB | {:.1} KiB | {:.1} KiB | {:.2} % of a core |",
            time(each(setup.took.as_secs_f64())),
            each(ours.files - before.files),
            each(theirs.files - setup.bare.files),
            each(ours.private - before.private),
            each(theirs.private - setup.bare.private),
            each(ours.shared - before.shared + theirs.shared - setup.bare.shared),
            idle * 100.0,
        );
    }
}

/// Prints the costs of a message, growing with what `what` says.
fn table(what: &str, shapes: &[(String, Shape)]) {
    println!(
        "\n| {what} | messages a round | time a message | a delivery | CPU of the publishers | … of the subscribers |"
    );
    println!("| ---: | ---: | ---: | ---: | ---: | ---: |");
    let mut rows: Vec<_> =
        shapes.iter().filter_map(|(name, shape)| Some((name, fits(name, *shape)?))).collect();
    let mut measured: Vec<Vec<Cost>> = rows.iter().map(|_| Vec::new()).collect();
    for (_, setup) in &mut rows {
        setup.round();
    }
    for _ in 0..ROUNDS {
        for ((_, setup), measured) in rows.iter_mut().zip(&mut measured) {
            measured.push(setup.round());
        }
    }
    for ((name, setup), costs) in rows.iter().zip(&measured) {
        let median = |count: usize, of: fn(&Cost) -> f64| {
            let mut all: Vec<_> = costs.iter().map(of).collect();
            all.sort_by(f64::total_cmp);
            time(all[all.len() / 2] / count as f64)
        };
        let messages = setup.shape.messages;
        println!(
            "| {name} | {messages} | {} | {} | {} | {} |",
            median(messages, |cost| cost.wall),
            median(setup.shape.deliveries(), |cost| cost.wall),
            median(messages, |cost| cost.ours),
            median(messages, |cost| cost.theirs),
        );
    }
}

/// Sets it up if there are descriptors enough; says so if not.
fn fits(name: &str, shape: Shape) -> Option<Setup> {
    let needed = shape.links() as u64 * FILES_PER_LINK * 5 / 4 + 64;
    match getrlimit(Resource::Nofile).current {
        Some(files) if files < needed => {
            eprintln!(
                "SKIPPED: the row of {name}: it takes {needed} descriptors, and RLIMIT_NOFILE is {files}"
            );
            None
        }
        _ => Some(Setup::start(shape)),
    }
}

/// What a round took, in seconds.
struct Cost {
    wall: f64,
    ours: f64,
    theirs: f64,
}

/// Publishers of a shape, and the process that has their subscribers.
struct Setup {
    publishers: Vec<ShmPublisher>,
    said: BufReader<ChildStdout>,
    child: Child,
    shape: Shape,
    /// From the first bind until all links stood.
    took: Duration,
    /// The child before it connected.
    bare: Footprint,
    runtime: Runtime,
    _dir: TempDir,
}

impl Setup {
    fn start(shape: Shape) -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o700)).expect("mode");
        let mut child = Command::new(env::current_exe().expect("own path"))
            .env(ROLE, words(&shape, dir.path()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start the subscribers");
        let said = BufReader::new(child.stdout.take().expect("piped"));
        let runtime = runtime();
        let mut this = Self {
            publishers: Vec::new(),
            said,
            child,
            shape,
            took: Duration::ZERO,
            bare: Footprint::default(),
            runtime,
            _dir: dir,
        };
        this.hear();
        this.bare = Footprint::of(this.child.id());
        let start = Instant::now();
        // It connects to all topics, and then waits for all publishers.
        drop(this.child.stdin.take());
        this.publishers = this.runtime.block_on(async {
            let names = (0..shape.topics).flat_map(|n| std::iter::repeat_n(n, shape.publishers));
            let bind = |n| ShmPublisher::builder(&topic(n)).runtime_dir(this._dir.path()).bind().unwrap();
            let publishers: Vec<_> = names.map(bind).collect();
            for publisher in &publishers {
                within(publisher.wait_for_subscribers(shape.subscribers)).await;
            }
            publishers
        });
        this.took = start.elapsed();
        this
    }

    fn round(&mut self) -> Cost {
        let (start, before) = (Instant::now(), cpu());
        self.runtime.block_on(within(async {
            for publisher in self.publishers.iter().cycle().take(self.shape.messages) {
                let mut loan = publisher.loan(self.shape.size).await.unwrap();
                loan.fill(7);
                publisher.send(loan).await.unwrap();
            }
            // What was left to their tasks: nothing of this runtime runs while the child is heard.
            for publisher in &self.publishers {
                publisher.flush().await.unwrap();
            }
        }));
        let ours = cpu() - before;
        let theirs = self.hear();
        Cost { wall: start.elapsed().as_secs_f64(), ours, theirs }
    }

    /// Of a core.
    fn idle_cpu(&self) -> f64 {
        let total = || cpu() + cpu_of(self.child.id());
        let before = total();
        // As a publisher's process idles: on its reactor.
        self.runtime.block_on(async { tokio::time::sleep(IDLE).await });
        (total() - before) / IDLE.as_secs_f64()
    }

    /// Waits for the child's next word: how much of a core's time it has used since the last one, in seconds.
    fn hear(&mut self) -> f64 {
        let mut line = String::new();
        self.said.read_line(&mut line).expect("read from the child");
        line.trim().parse().expect("the child ended without a word")
    }
}

impl Drop for Setup {
    fn drop(&mut self) {
        let publishers = std::mem::take(&mut self.publishers);
        self.runtime.block_on(async {
            for publisher in publishers {
                let _ = tokio::time::timeout(LIMIT, publisher.close()).await;
            }
        });
        let deadline = Instant::now() + LIMIT;
        while self.child.try_wait().is_ok_and(|status| status.is_none()) && Instant::now() < deadline {
            std::thread::yield_now();
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const ROLE: &str = "TOKIO_SHM_SCALE_ROLE";

fn words(shape: &Shape, dir: &Path) -> String {
    let Shape { topics, publishers, subscribers, depth, .. } = shape;
    let deliveries = shape.deliveries();
    format!(
        "{topics} {publishers} {subscribers} {depth} {deliveries} {}",
        dir.to_str().expect("a path of UTF-8")
    )
}

/// The other process: reads all, and says so each time that a round is complete.
fn subscribe(words: &str) {
    let words: Vec<_> = words.splitn(6, ' ').collect();
    let number = |nth: usize| words[nth].parse::<usize>().expect("a number");
    let (topics, publishers, subscribers) = (number(0), number(1), number(2));
    let (depth, deliveries, dir) = (number(3) as u32, number(4), Path::new(words[5]));
    let runtime = runtime();
    println!("0");
    // Until the other side has seen what this process is without subscribers.
    let _ = std::io::stdin().read_line(&mut String::new());
    let read = Rc::new(Cell::new(0));
    let said = Rc::new(Cell::new(cpu()));
    LocalSet::new().block_on(&runtime, async {
        let names = (0..topics).flat_map(|n| std::iter::repeat_n(n, subscribers));
        let connect = |n| {
            let subscriber = ShmSubscriber::builder(&topic(n)).runtime_dir(dir).depth(depth);
            subscriber.end_with_last_publisher(true).connect().unwrap()
        };
        let mut reading = JoinSet::new();
        for mut subscriber in names.map(connect).collect::<Vec<_>>() {
            let (read, said) = (Rc::clone(&read), Rc::clone(&said));
            reading.spawn_local(async move {
                within(subscriber.wait_for_publishers(publishers)).await.unwrap();
                while let Ok(sample) = subscriber.recv().await {
                    let words =
                        sample.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap()));
                    black_box(words.fold(0, |sum: u64, word| sum.wrapping_add(word)));
                    drop(sample);
                    read.set(read.get() + 1);
                    if read.get() == deliveries {
                        read.set(0);
                        println!("{}", cpu() - said.replace(cpu()));
                    }
                }
            });
        }
        reading.join_all().await;
    });
}

fn topic(number: usize) -> String {
    format!("group{}/topic{}", number / 100, number % 100)
}

/// What a process has.
#[derive(Debug, Default)]
struct Footprint {
    files: f64,
    /// In KiB, this and the next: what it has for itself, …
    private: f64,
    /// … and its part of the memory that it shares.
    shared: f64,
}

impl Footprint {
    fn of(process: u32) -> Self {
        let files = std::fs::read_dir(format!("/proc/{process}/fd")).expect("its descriptors").count() as f64;
        let maps = std::fs::read_to_string(format!("/proc/{process}/smaps_rollup")).expect("its memory");
        let field = |name: &str| -> f64 {
            let line = maps.lines().find_map(|line| line.strip_prefix(name)).expect("a kernel since 5.4");
            line.trim().trim_end_matches(" kB").parse().expect("a number")
        };
        Self { files, private: field("Pss_Anon:"), shared: field("Pss_Shmem:") }
    }
}

/// Seconds of a core's time that this process has used.
fn cpu() -> f64 {
    let used = clock_gettime(ClockId::ProcessCPUTime);
    used.tv_sec as f64 + used.tv_nsec as f64 / 1e9
}

/// The same of another process, by what the scheduler counts for each thread.
fn cpu_of(process: u32) -> f64 {
    let threads = std::fs::read_dir(format!("/proc/{process}/task")).expect("its threads");
    let of = |thread: std::io::Result<std::fs::DirEntry>| -> Option<f64> {
        let counted = std::fs::read_to_string(thread.ok()?.path().join("schedstat")).ok()?;
        counted.split(' ').next()?.parse().ok()
    };
    threads.filter_map(of).sum::<f64>() / 1e9
}

fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let info = read("/proc/cpuinfo");
    let model = info.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("unknown");
    let cores = info.lines().filter(|line| line.starts_with("processor")).count();
    let kernel = read("/proc/sys/kernel/osrelease");
    let kernel = kernel.trim().split('-').next().unwrap_or_default();
    format!("{}, {cores} cores, Linux {kernel}", model.trim_start_matches([' ', '\t', ':']))
}

fn bytes(size: usize) -> String {
    match size.ilog2() {
        0..10 => format!("{size} B"),
        10..20 => format!("{} KiB", size >> 10),
        _ => format!("{} MiB", size >> 20),
    }
}

fn time(seconds: f64) -> String {
    match seconds * 1e9 {
        ns @ ..1_000.0 => format!("{ns:.0} ns"),
        ns @ ..1_000_000.0 => format!("{:.2} µs", ns / 1e3),
        ns => format!("{:.2} ms", ns / 1e6),
    }
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime")
}

/// Keeps this process on one core, if it may run there: where they meet on one, they only keep each other from running.
fn pin_to(core: usize) {
    let mut one = CpuSet::new();
    one.set(core);
    let _ = sched_setaffinity(None, &one);
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, future).await.expect("within the limit")
}
