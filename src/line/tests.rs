use super::*;

const JOINED: Result<Joined, NoPlace> = Ok(Joined { missed: false, kept: false });
const KEPT: Result<Joined, NoPlace> = Ok(Joined { missed: false, kept: true });

fn numbers(front: &mut Front<u32>) -> Vec<u32> {
    std::iter::from_fn(|| front.pop()).collect()
}

#[test]
fn places_run_out_and_come_back() {
    let (line, mut front) = Line::new(2);
    let mut guess = 0;
    assert_eq!(line.join(|| 1), JOINED);
    assert_eq!(line.reserve(&mut guess), Ok(()));
    assert_eq!(line.join(|| 2), Err(NoPlace::Full));
    assert!(!line.all_back());
    line.cancel_reserved();
    assert_eq!(line.join(|| 3), JOINED);
    assert_eq!(line.join(|| 4), Err(NoPlace::Full));
    assert_eq!(numbers(&mut front), [1, 3]);
    assert!(front.is_empty());
    assert_eq!((line.join(|| 4), line.len()), (Err(NoPlace::Full), 2), "what was taken keeps its place");
    front.give_back(1);
    assert_eq!(line.join(|| 5), JOINED);
    assert_eq!(numbers(&mut front), [5]);
    front.give_back(2);
    assert!(line.all_back());
}

#[test]
fn places_reserved_are_no_obstacle_to_an_end() {
    let (line, _front) = Line::new(2);
    let mut guess = 0;
    assert_eq!(line.reserve(&mut guess), Ok(()));
    line.close();
    assert!(line.all_back());
    assert_eq!(line.join_reserved(&mut guess, true, || 1), Err(NoPlace::Closed));
    assert!(line.all_back() && line.is_closed());
    assert_eq!(line.join(|| 1), Err(NoPlace::Closed));
    assert_eq!(line.reserve(&mut guess), Err(NoPlace::Closed));
}

#[test]
fn reserved_place_is_kept_while_half_are_free() {
    let (line, mut front) = Line::new(4);
    let mut guess = 0;
    assert_eq!(line.reserve(&mut guess), Ok(()));
    assert_eq!(line.join_reserved(&mut guess, true, || 1), KEPT);
    assert_eq!(line.join_reserved(&mut guess, true, || 2), JOINED);
    assert_eq!(line.reserve(&mut guess), Ok(()));
    assert_eq!(line.join_reserved(&mut guess, false, || 3), JOINED);
    assert_eq!((line.join(|| 4), line.join(|| 5)), (JOINED, Err(NoPlace::Full)));
    assert_eq!(numbers(&mut front), [1, 2, 3, 4]);
    // Neither a guess that is old nor one that never was makes a difference.
    front.give_back(4);
    for mut guess in [guess, 0, 7, CLOSED, RESERVED * 4 + 3, u64::MAX] {
        assert_eq!(line.reserve(&mut guess), Ok(()));
        assert_eq!(line.join_reserved(&mut guess, true, || 6), KEPT);
        line.cancel_reserved();
        assert_eq!(numbers(&mut front), [6]);
        front.give_back(1);
    }
    assert_eq!(line.len(), 0);
}

#[test]
fn positions_go_round() {
    let (line, mut front) = Line::new(3);
    let start = POSITION - 2;
    line.word.store(start, Ordering::Relaxed);
    line.given_back.store(start, Ordering::Relaxed);
    front.next = start;
    for round in 0..4 {
        let target = line.joined().wrapping_add(3);
        assert!(!is_reached(line.joined(), target));
        for number in 0..3 {
            assert_eq!(line.join(|| 10 * round + number), JOINED);
        }
        assert_eq!(line.join(|| 0), Err(NoPlace::Full));
        assert!(is_reached(line.joined(), target) && line.len() == 3);
        assert_eq!(numbers(&mut front), [0, 1, 2].map(|number| 10 * round + number));
        front.give_back(3);
        assert!(front.is_empty() && line.all_back());
    }
}

#[test]
fn what_is_left_in_line_is_dropped_with_it() {
    let thing = std::sync::Arc::new(());
    let (line, mut front) = Line::new(8);
    for _ in 0..3 {
        let _ = line.join(|| thing.clone()).unwrap();
    }
    drop(front.pop());
    assert_eq!(std::sync::Arc::strong_count(&thing), 3);
    drop((front, line));
    assert_eq!(std::sync::Arc::strong_count(&thing), 1);
}

#[test]
fn thing_that_the_front_came_too_early_for_is_told_so_and_taken_by_the_next_look() {
    let (line, front) = Line::new(2);
    let front = std::rc::Rc::new(std::cell::RefCell::new(front));
    for (round, looks) in [0, 1, 2].into_iter().enumerate() {
        let early = std::rc::Rc::clone(&front);
        crate::kill::detour("join: counted", move || {
            (0..looks).for_each(|_| assert_eq!(early.borrow_mut().pop(), None));
        });
        assert_eq!(line.join(|| round), Ok(Joined { missed: looks > 0, kept: false }));
        assert_eq!(line.join(|| 10 + round), Ok(Joined { missed: false, kept: false }));
        let mut front = front.borrow_mut();
        assert_eq!([front.pop(), front.pop(), front.pop()], [Some(round), Some(10 + round), None]);
        front.give_back(2);
    }
}
