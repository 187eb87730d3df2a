//! Append and gather against lists of lists.

use headkv_core::{Entries, Pools, Rows, append, gather};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn append_writes_behind_each_row_and_nowhere_else(
        shape in prop::collection::vec((0i64..30, 0i64..4), 2..7),
        batch in 1usize..3,
        steps in 0usize..9,
        valid in prop::option::of(prop::collection::vec(any::<bool>(), 18)),
        dim in 1usize..70,
        bytes in prop_oneof![Just(0usize), Just(4), Just(8)],
        threads in 1usize..4,
    ) {
        let rows = shape.len() / batch * batch;
        let length: Vec<i64> = shape[..rows].iter().map(|row| row.0).collect();
        let capacity: Vec<i64> = shape[..rows].iter().map(|row| row.0 + steps as i64 + row.1).collect();
        // The rows lie in the opposite order, one after another.
        let slots = capacity.iter().sum::<i64>() as usize;
        let mut start = vec![0; rows];
        (0..rows).rev().fold(0, |at, row| { start[row] = at; at + capacity[row] });

        let new: Vec<u16> = (0..rows * steps * dim).map(|i| i as u16).collect();
        let (mut keys, mut values) = (vec![u16::MAX; slots * dim], vec![u16::MAX - 1; slots * dim]);
        let mut positions = vec![-1; slots];
        // Scales are bytes that go with an entry; without them there are none a slot.
        let new_scales: Vec<u8> = (0..rows * steps * bytes).map(|i| i as u8).collect();
        let mut scales = vec![7u8; slots * bytes];
        let mut want_scales = scales.clone();
        let (mut want_keys, mut want_values, mut want_positions) = (keys.clone(), values.clone(), positions.clone());
        let valid = valid.map(|valid| valid[..batch * steps].to_vec());
        for row in 0..rows {
            let mut slot = (start[row] + length[row]) as usize;
            for step in 0..steps {
                if valid.as_ref().is_some_and(|valid| !valid[row / (rows / batch) * steps + step]) {
                    continue;
                }
                let entry = &new[(row * steps + step) * dim..][..dim];
                want_keys[slot * dim..][..dim].copy_from_slice(entry);
                want_values[slot * dim..][..dim].copy_from_slice(entry);
                want_positions[slot] = 1000 + step as i32;
                want_scales[slot * bytes..][..bytes]
                    .copy_from_slice(&new_scales[(row * steps + step) * bytes..][..bytes]);
                slot += 1;
            }
        }
        let mut pools = Pools {
            head_dim: dim,
            keys: &mut keys,
            values: &mut values,
            positions: &mut positions,
            scales: &mut scales,
        };
        let layout = Rows { start: &start, length: &length, capacity: &capacity };
        let entries =
            Entries { batch, steps, keys: &new, values: &new, scales: &new_scales, valid: valid.as_deref(), first_position: 1000 };
        append(&mut pools, &layout, &entries, threads).unwrap();
        prop_assert_eq!((keys, values, positions), (want_keys, want_values, want_positions));
        prop_assert_eq!(scales, want_scales);
    }

    #[test]
    fn gather_copies_the_slots_that_were_asked_for(
        source in prop::collection::vec(0i64..60, 0..50),
        slots in 1usize..50,
        dim in 1usize..70,
        bytes in prop_oneof![Just(0usize), Just(4), Just(8)],
        threads in 1usize..4,
    ) {
        let scales: Vec<u8> = (0..slots * bytes).map(|i| (i * 3) as u8).collect();
        let mut new_scales = vec![0; source.len() * bytes];
        let keys: Vec<u16> = (0..slots * dim).map(|i| i as u16).collect();
        let values: Vec<u16> = keys.iter().map(|x| !x).collect();
        let positions: Vec<i32> = (0..slots as i32).collect();
        let n = source.len();
        let (mut new_keys, mut new_values, mut new_positions) = (vec![0; n * dim], vec![0; n * dim], vec![0; n]);
        let mut target = Pools {
            head_dim: dim,
            keys: &mut new_keys,
            values: &mut new_values,
            positions: &mut new_positions,
            scales: &mut new_scales,
        };
        gather((&keys, &values, &positions, &scales), &source, &mut target, threads).unwrap();
        for (slot, &from) in source.iter().enumerate() {
            let from = from.min(slots as i64 - 1) as usize;
            prop_assert_eq!(&new_keys[slot * dim..][..dim], &keys[from * dim..][..dim]);
            prop_assert_eq!(&new_values[slot * dim..][..dim], &values[from * dim..][..dim]);
            prop_assert_eq!(new_positions[slot], positions[from]);
            prop_assert_eq!(&new_scales[slot * bytes..][..bytes], &scales[from * bytes..][..bytes]);
        }
    }
}

#[test]
fn large_moves_are_shared_by_threads() {
    let (slots, dim) = (9_001usize, 64);
    let keys: Vec<f32> = (0..slots * dim).map(|i| i as f32).collect();
    let positions: Vec<i32> = (0..slots as i32).collect();
    let source: Vec<i64> = (0..slots as i64).rev().collect();
    let (mut new_keys, mut new_values, mut new_positions) =
        (vec![0.0; slots * dim], vec![0.0; slots * dim], vec![0; slots]);
    let mut target = Pools {
        head_dim: dim,
        keys: &mut new_keys,
        values: &mut new_values,
        positions: &mut new_positions,
        scales: &mut [],
    };
    gather((&keys, &keys, &positions, &[]), &source, &mut target, 3).unwrap();
    for slot in 0..slots {
        assert_eq!(new_keys[slot * dim..][..dim], keys[(slots - 1 - slot) * dim..][..dim]);
        assert_eq!(new_positions[slot] as usize, slots - 1 - slot);
    }
    assert_eq!(new_keys, new_values);
}

#[test]
fn wrong_arguments_are_refused_and_nothing_is_written() {
    let mut keys = [7u16; 12];
    let (mut values, mut positions) = (keys, [7i32; 6]);
    let mut check = |start: &[i64], length: &[i64], capacity: &[i64], entries: Entries<u16>| {
        let (before, rows) = (keys, Rows { start, length, capacity });
        let mut pools = Pools {
            head_dim: 2,
            keys: &mut keys,
            values: &mut values,
            positions: &mut positions,
            scales: &mut [],
        };
        let result = append(&mut pools, &rows, &entries, 2);
        assert!(result.is_ok() || (keys == before && values == before && positions == [7; 6]));
        result
    };
    let new = [1u16; 4];
    let good =
        Entries { batch: 1, steps: 1, keys: &new, values: &new, scales: &[], valid: None, first_position: 0 };
    assert!(check(&[0, 3], &[0, 0], &[3, 3], Entries { scales: &[1], ..good }).is_err(), "scales for none");
    assert!(check(&[0, 3], &[3, 0], &[3, 3], good).is_err(), "a full row");
    assert!(check(&[0, 2], &[0, 0], &[3, 3], good).is_err(), "overlapping rows");
    assert!(check(&[0, 4], &[0, 0], &[3, 3], good).is_err(), "past the end");
    assert!(check(&[0, 3], &[0, -1], &[3, 3], good).is_err(), "a negative length");
    assert!(check(&[0, 3], &[0, 0], &[3, 3], Entries { keys: &new[1..], ..good }).is_err(), "short keys");
    assert!(check(&[0, 3], &[0, 0], &[3, 3], Entries { valid: Some(&[]), ..good }).is_err(), "short valid");
    assert!(check(&[0, 3], &[0, 0], &[3, 3], Entries { batch: 3, ..good }).is_err(), "batch");
    let late = Entries { first_position: i64::from(i32::MAX), ..good };
    assert!(check(&[0, 3], &[0, 0], &[3, 3], late).is_err(), "positions that do not fit");
    assert!(check(&[0, 3], &[0, 0], &[3, 3], good).is_ok());

    let mut pools = Pools {
        head_dim: 2,
        keys: &mut keys,
        values: &mut values,
        positions: &mut positions,
        scales: &mut [],
    };
    let old = ([0u16; 4], [0u16; 4], [0i32; 2]);
    assert!(gather((&old.0, &old.1, &old.2, &[]), &[0, 1, -1, 0, 0, 0], &mut pools, 1).is_err());
    assert!(gather((&old.0, &old.1, &old.2, &[]), &[0; 5], &mut pools, 1).is_err());
    assert!(gather((&old.0[1..], &old.1, &old.2, &[]), &[0; 6], &mut pools, 1).is_err());
    assert!(gather((&old.0, &old.1, &old.2, &[0; 2]), &[0; 6], &mut pools, 1).is_err());
    assert!(gather((&[], &[], &[], &[]), &[0; 6], &mut pools, 1).is_err());
}
