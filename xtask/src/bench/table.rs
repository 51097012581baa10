//! Formats figures as aligned text.

use serde_json::{Map, Value};

/// A row of a table: names of columns, and values.
pub(crate) type Row = Vec<(&'static str, Value)>;

/// A number rounded to its significant decimals.
pub(crate) fn rounded(value: f64, decimals: i32) -> Value {
    let scale = 10f64.powi(decimals);
    serde_json::json!((value * scale).round() / scale)
}

/// Prints rows that all have the same columns.
pub(crate) fn print(rows: &[Row]) {
    let Some(first) = rows.first() else { return };
    let mut cells = vec![first.iter().map(|(name, _)| (*name).to_owned()).collect::<Vec<_>>()];
    cells.extend(rows.iter().map(|row| row.iter().map(|(_, value)| text(value)).collect()));
    print_cells(&cells);
}

fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        // JSON writes `12.0`; the table drops decimals without information.
        other => other.to_string().trim_end_matches(".0").to_owned(),
    }
}

/// The rows as JSON.
pub(crate) fn json(rows: &[Row]) -> Value {
    let object = |row: &Row| -> Map<_, _> {
        row.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect()
    };
    rows.iter().map(|row| Value::Object(object(row))).collect()
}

/// Prints rows of cells under a heading row: columns of numbers are aligned to the right, others to the left.
pub(crate) fn print_cells(rows: &[Vec<String>]) {
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let is_number = |column: usize| rows[1..].iter().any(|row| row[column].parse::<f64>().is_ok());
    for row in rows {
        let cells = row.iter().enumerate().map(|(column, cell)| {
            let width = width(column);
            if is_number(column) { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        println!("{}", cells.collect::<Vec<_>>().join("  ").trim_end());
    }
}

/// The median; of an even number of values, the upper of the middle two.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_median_is_one_of_the_values() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn rows_become_objects() {
        let rows = [vec![("open", json!(1000)), ("ready, ms", rounded(12.345, 1))]];
        assert_eq!(json(&rows), json!([{"open": 1000, "ready, ms": 12.3}]));
        assert_eq!(text(&rounded(12.04, 1)), "12");
        assert_eq!(text(&Value::Null), "-");
    }
}
