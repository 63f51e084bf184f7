//! Every operation on a bucket under every fault, through the real SDK: what must come of it, and what must never.
//!
//! Read [`table::rows`] first: what is expected, one row for each fault and one column for each operation. How a cell
//! is tried and what holds in all of them (I3, I4, I8, I14, I19) is in `cell.rs`. The table is printed and written to
//! `target/tmp/store-faults.txt`.

mod cell;
mod operation;
mod table;

use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::operation::Operation;
use crate::table::Row;

/// Cells at once. They mostly wait.
const AT_ONCE: usize = 24;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_store_operation_under_every_fault() {
    let rows = table::rows();
    let room = Arc::new(Semaphore::new(AT_ONCE));
    let mut cells = JoinSet::new();
    for (number, row) in rows.iter().enumerate() {
        for (column, operation) in Operation::ALL.into_iter().enumerate() {
            let (row, room) = (row.clone(), room.clone());
            cells.spawn(async move {
                let _room = room.acquire_owned().await.expect("never closed");
                (number, column, cell::run(operation, &row).await)
            });
        }
    }
    let mut seen: Vec<Vec<Option<cell::Seen>>> = rows.iter().map(|_| vec![None; Operation::ALL.len()]).collect();
    while let Some(cell) = cells.join_next().await {
        let (number, column, cell) = cell.expect("a cell does not panic");
        seen[number][column] = Some(cell);
    }
    let (text, red) = report(&rows, &seen);
    println!("{text}");
    std::fs::write(concat!(env!("CARGO_TARGET_TMPDIR"), "/store-faults.txt"), &text).expect("there is room");
    assert!(red.is_empty(), "{} cells are red:\n{}", red.len(), red.join("\n"));
}

/// The table as it was seen, and what is wrong in it.
fn report(rows: &[Row], seen: &[Vec<Option<cell::Seen>>]) -> (String, Vec<String>) {
    let mut red = Vec::new();
    let mut text = format!("{:<44}", "");
    text.extend(Operation::ALL.iter().map(|o| format!("{:>9}", o.name())));
    for (row, cells) in rows.iter().zip(seen) {
        text.push_str(&format!("\n{:<44}", row.fault));
        let expected: Vec<&str> = row.expected.split_whitespace().collect();
        assert_eq!(expected.len(), Operation::ALL.len(), "{}: a word for each operation", row.fault);
        for ((operation, want), cell) in Operation::ALL.into_iter().zip(expected).zip(cells) {
            let cell = cell.as_ref().expect("every cell was tried");
            let is_red = cell.word != want || !cell.wrong.is_empty();
            text.push_str(&format!("{:>9}", format!("{}{}", if is_red { "!" } else { "" }, cell.word)));
            if is_red {
                let what = cell.wrong.join("; ");
                let said = &cell.said;
                red.push(format!(
                    "  {}, {}: want {want}, got {} {what} ({said})",
                    row.fault,
                    operation.name(),
                    cell.word
                ));
            }
        }
    }
    text.push_str(&format!("\n{} cells, {} red\n", rows.len() * Operation::ALL.len(), red.len()));
    text.push_str(table::WORDS);
    (text, red)
}
