//! Append and gather against lists of lists.

use headkv_core::{Entries, Pools, Rows, append, gather};
use proptest::prelude::*;

/// Bytes of keys, values and scales: of every width, also of none.
fn widths() -> impl Strategy<Value = [usize; 3]> {
    let scales = prop_oneof![Just(0usize), Just(4), Just(8)];
    (1usize..140, 1usize..140, scales).prop_map(|(keys, values, scales)| [keys, values, scales])
}

fn bytes(count: usize, step: usize) -> Vec<u8> {
    (0..count).map(|i| (i * step) as u8).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn append_writes_behind_each_row_and_nowhere_else(
        shape in prop::collection::vec((0i64..30, 0i64..4), 2..7),
        batch in 1usize..3,
        steps in 0usize..9,
        valid in prop::option::of(prop::collection::vec(any::<bool>(), 18)),
        widths in widths(),
        threads in 1usize..4,
    ) {
        let rows = shape.len() / batch * batch;
        let length: Vec<i64> = shape[..rows].iter().map(|row| row.0).collect();
        let capacity: Vec<i64> = shape[..rows].iter().map(|row| row.0 + steps as i64 + row.1).collect();
        // The rows lie in the opposite order, one after another.
        let slots = capacity.iter().sum::<i64>() as usize;
        let mut start = vec![0; rows];
        (0..rows).rev().fold(0, |at, row| { start[row] = at; at + capacity[row] });

        let new = [0, 1, 2].map(|i| bytes(rows * steps * widths[i], 2 * i + 1));
        let mut pools = [0, 1, 2].map(|i| vec![100 + i as u8; slots * widths[i]]);
        let mut positions = vec![-1; slots];
        let (mut want, mut want_positions) = (pools.clone(), positions.clone());
        let valid = valid.map(|valid| valid[..batch * steps].to_vec());
        for row in 0..rows {
            let mut slot = (start[row] + length[row]) as usize;
            for step in 0..steps {
                if valid.as_ref().is_some_and(|valid| !valid[row / (rows / batch) * steps + step]) {
                    continue;
                }
                for ((want, new), width) in want.iter_mut().zip(&new).zip(widths) {
                    want[slot * width..][..width].copy_from_slice(&new[(row * steps + step) * width..][..width]);
                }
                want_positions[slot] = 1000 + step as i32;
                slot += 1;
            }
        }
        let mut target =
            Pools { widths, columns: pools.each_mut().map(Vec::as_mut_slice), positions: &mut positions };
        let layout = Rows { start: &start, length: &length, capacity: &capacity };
        let columns = new.each_ref().map(Vec::as_slice);
        let entries = Entries { batch, steps, columns, valid: valid.as_deref(), first_position: 1000 };
        append(&mut target, &layout, &entries, threads).unwrap();
        prop_assert_eq!((pools, positions), (want, want_positions));
    }

    #[test]
    fn gather_copies_the_slots_that_were_asked_for(
        source in prop::collection::vec(0i64..60, 0..50),
        slots in 1usize..50,
        widths in widths(),
        threads in 1usize..4,
    ) {
        let (n, pools) = (source.len(), [0, 1, 2].map(|i| bytes(slots * widths[i], 2 * i + 1)));
        let positions: Vec<i32> = (0..slots as i32).collect();
        let (mut new, mut new_positions) = (widths.map(|width| vec![0; n * width]), vec![0; n]);
        let mut target =
            Pools { widths, columns: new.each_mut().map(Vec::as_mut_slice), positions: &mut new_positions };
        let columns = pools.each_ref().map(Vec::as_slice);
        gather(columns, &positions, &source, &mut target, threads).unwrap();
        for (slot, &from) in source.iter().enumerate() {
            let from = from.min(slots as i64 - 1) as usize;
            for ((new, pool), width) in new.iter().zip(&pools).zip(widths) {
                prop_assert_eq!(&new[slot * width..][..width], &pool[from * width..][..width]);
            }
            prop_assert_eq!(new_positions[slot], positions[from]);
        }
    }
}

#[test]
fn large_moves_are_shared_by_threads() {
    let (slots, widths) = (9_001usize, [256, 64, 0]);
    let keys: Vec<u8> = (0..slots * 256).map(|i| (i / 7) as u8).collect();
    let positions: Vec<i32> = (0..slots as i32).collect();
    let source: Vec<i64> = (0..slots as i64).rev().collect();
    let (mut new_keys, mut new_values, mut new_positions) =
        (vec![0; slots * 256], vec![0; slots * 64], vec![0; slots]);
    let mut target =
        Pools { widths, columns: [&mut new_keys, &mut new_values, &mut []], positions: &mut new_positions };
    gather([&keys, &keys[..slots * 64], &[]], &positions, &source, &mut target, 3).unwrap();
    for slot in 0..slots {
        let from = slots - 1 - slot;
        assert_eq!(new_keys[slot * 256..][..256], keys[from * 256..][..256]);
        assert_eq!(new_values[slot * 64..][..64], keys[from * 64..][..64]);
        assert_eq!(new_positions[slot] as usize, from);
    }
}

#[test]
fn wrong_arguments_are_refused_and_nothing_is_written() {
    let widths = [4, 2, 0];
    let (mut keys, mut values, mut positions) = ([7u8; 24], [7u8; 12], [7i32; 6]);
    let mut check = |start: &[i64], length: &[i64], capacity: &[i64], entries: Entries| {
        let rows = Rows { start, length, capacity };
        let before = (keys, values);
        let mut pools =
            Pools { widths, columns: [&mut keys, &mut values, &mut []], positions: &mut positions };
        let result = append(&mut pools, &rows, &entries, 2);
        assert!(result.is_ok() || ((keys, values) == before && positions == [7; 6]));
        result
    };
    let new = [1u8; 8];
    let good =
        Entries { batch: 1, steps: 1, columns: [&new, &new[..4], &[]], valid: None, first_position: 0 };
    let with = |columns| Entries { columns, ..good };
    assert!(check(&[0, 3], &[0, 0], &[3, 3], with([&new, &new[..4], &[1]])).is_err(), "scales for none");
    assert!(check(&[0, 3], &[3, 0], &[3, 3], good).is_err(), "a full row");
    assert!(check(&[0, 2], &[0, 0], &[3, 3], good).is_err(), "overlapping rows");
    assert!(check(&[0, 4], &[0, 0], &[3, 3], good).is_err(), "past the end");
    assert!(check(&[0, 3], &[0, -1], &[3, 3], good).is_err(), "a negative length");
    assert!(check(&[0, 3], &[0, 0], &[3, 3], with([&new[1..], &new[..4], &[]])).is_err(), "short keys");
    assert!(check(&[0, 3], &[0, 0], &[3, 3], with([&new, &new, &[]])).is_err(), "values as wide as keys");
    assert!(check(&[0, 3], &[0, 0], &[3, 3], Entries { valid: Some(&[]), ..good }).is_err(), "short valid");
    assert!(check(&[0, 3], &[0, 0], &[3, 3], Entries { batch: 3, ..good }).is_err(), "batch");
    let late = Entries { first_position: i64::from(i32::MAX), ..good };
    assert!(check(&[0, 3], &[0, 0], &[3, 3], late).is_err(), "positions that do not fit");
    assert!(check(&[0, 3], &[0, 0], &[3, 3], good).is_ok());

    let mut pools = Pools { widths, columns: [&mut keys, &mut values, &mut []], positions: &mut positions };
    let (old_keys, old_values, where_from) = ([0u8; 8], [0u8; 4], [0i32; 2]);
    let old: [&[u8]; 3] = [&old_keys, &old_values, &[]];
    assert!(gather(old, &where_from, &[0, 1, -1, 0, 0, 0], &mut pools, 1).is_err());
    assert!(gather(old, &where_from, &[0; 5], &mut pools, 1).is_err());
    assert!(gather([&old_keys[1..], old[1], old[2]], &where_from, &[0; 6], &mut pools, 1).is_err());
    assert!(gather([old[0], old[1], &[0; 2]], &where_from, &[0; 6], &mut pools, 1).is_err());
    assert!(gather([&[], &[], &[]], &[], &[0; 6], &mut pools, 1).is_err());
    assert!(gather(old, &where_from, &[0; 6], &mut pools, 1).is_ok());
}
