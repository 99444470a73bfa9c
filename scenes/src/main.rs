//! Runs the scenes of a whole publisher: `scenes SCHEDULES SEED [WORD]`, those whose name has the word. See `.ci/shuttle`.

#[cfg(tokio_shm_shuttle)]
fn main() {
    let mut args = std::env::args().skip(1);
    let mut number =
        || args.next().and_then(|arg| arg.parse().ok()).expect("usage: scenes SCHEDULES SEED [WORD]");
    let (schedules, seed) = (number(), number());
    let word = args.next().unwrap_or_default();
    let mut all = 0;
    for (name, scene) in tokio_shm::scenes::SCENES.iter().filter(|(name, _)| name.contains(&word)) {
        let begun = std::time::Instant::now();
        print!("{name}: ");
        let _ = std::io::Write::flush(&mut std::io::stdout());
        let run = tokio_shm::scenes::check(*scene, schedules, seed as u64);
        println!("{run} schedules, {:.1} s", begun.elapsed().as_secs_f64());
        all += run;
    }
    println!("{all} schedules");
}

#[cfg(not(tokio_shm_shuttle))]
fn main() {
    println!("compile with --cfg tokio_shm_shuttle, as .ci/shuttle does");
}
