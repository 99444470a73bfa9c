//! Segments that one side of a link used lately, found without a look into its map.

/// The ids of a publisher's segments follow each other, so that as many of them are found.
const PLACES: usize = 8;

/// What belongs to each of some segments, by id; the place of one that was not used lately is taken by another.
#[derive(Debug)]
pub(super) struct Recent<T>([Option<(u64, T)>; PLACES]);

impl<T> Recent<T> {
    pub(super) const fn new() -> Self {
        Self([const { None }; PLACES])
    }

    #[inline]
    pub(super) fn get(&self, id: u64) -> Option<&T> {
        match &self.0[place(id)] {
            Some((known, value)) if *known == id => Some(value),
            _ => None,
        }
    }

    pub(super) fn put(&mut self, id: u64, value: T) {
        self.0[place(id)] = Some((id, value));
    }

    pub(super) fn forget(&mut self, id: u64) {
        self.0[place(id)].take_if(|(known, _)| *known == id);
    }
}

#[inline]
fn place(id: u64) -> usize {
    id as usize % PLACES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_in_a_row_are_all_found_and_one_in_the_place_of_another_is_not_taken_for_it() {
        let mut recent = Recent::new();
        let ids = 5..5 + PLACES as u64;
        ids.clone().for_each(|id| recent.put(id, id));
        assert!(ids.clone().all(|id| recent.get(id) == Some(&id)));
        recent.put(ids.end, 0);
        assert_eq!((recent.get(ids.start), recent.get(ids.end)), (None, Some(&0)));
        recent.forget(ids.start);
        assert_eq!(recent.get(ids.end), Some(&0), "another has its place");
        recent.forget(ids.end);
        assert_eq!(recent.get(ids.end), None);
    }
}
