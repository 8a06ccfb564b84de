//! A flow as a drawing: each step under the last of those that it comes after.

use console::one_line;
use queue_core::flow::{StepStatus, StepView};

/// The lines of the drawing.
pub fn draw(steps: &[StepView]) -> Vec<String> {
    let parent = |step: &StepView| {
        let place = |name: &String| steps.iter().position(|other| other.name == *name);
        step.after.iter().filter_map(place).max()
    };
    let parents: Vec<Option<usize>> = steps.iter().map(parent).collect();
    let widest = steps.iter().map(|step| step.name.len()).max().unwrap_or(0);
    let mut lines = Vec::new();
    branch(steps, &parents, None, "", widest, &mut lines);
    lines
}

fn branch(
    steps: &[StepView],
    parents: &[Option<usize>],
    parent: Option<usize>,
    indent: &str,
    widest: usize,
    lines: &mut Vec<String>,
) {
    let children: Vec<usize> = (0..steps.len()).filter(|at| parents[*at] == parent).collect();
    // What has one follower goes on below: only where a flow splits it moves to the right.
    let is_split = children.len() > 1;
    for (place, at) in children.iter().enumerate() {
        let is_last = place + 1 == children.len();
        let (own, below) = match (is_split, is_last) {
            (false, _) => (indent.to_owned(), indent.to_owned()),
            (true, false) => (format!("{indent}├─ "), format!("{indent}│  ")),
            (true, true) => (format!("{indent}└─ "), format!("{indent}   ")),
        };
        lines.push(format!("{own}{}", line(&steps[*at], widest)));
        branch(steps, parents, Some(*at), &below, widest, lines);
    }
}

fn line(step: &StepView, widest: usize) -> String {
    let mark = match step.status {
        StepStatus::Waiting => '·',
        StepStatus::Pending | StepStatus::Scheduled => '○',
        StepStatus::Running => '●',
        StepStatus::Done => '✔',
        StepStatus::Failed => '✘',
        StepStatus::Cancelled => '■',
        StepStatus::Skipped => '–',
    };
    let mut line = format!("{mark} {:widest$}  {}", step.name, step.status);
    let mut more: Vec<String> = Vec::new();
    if step.after.len() > 1 || step.on != "done" {
        more.push(format!("after {}", step.after.join(", ")));
    }
    if step.on != "done" {
        more.push(format!("on {}", step.on));
    }
    more.extend(step.from.iter().map(|from| format!("in {from}")));
    if !step.attempts.is_empty() {
        more.push(format!("after {} tries", step.attempts.len()));
    }
    more.extend(step.progress.iter().map(|text| one_line(text)));
    more.extend(step.error.iter().map(|text| one_line(text)));
    if !more.is_empty() {
        line.push_str(&format!("  ({})", more.join("; ")));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(name: &str, after: &[&str], on: &str, status: StepStatus) -> StepView {
        StepView {
            name: name.into(),
            job: String::new(),
            after: after.iter().map(|name| (*name).to_owned()).collect(),
            on: on.into(),
            status,
            from: None,
            queued_at: None,
            started_at: None,
            ended_at: None,
            error: None,
            attempts: Vec::new(),
            progress: None,
            rows: None,
            checkpoint: None,
        }
    }

    #[test]
    fn a_flow_is_drawn_downwards_and_splits_to_the_right() {
        let mut steps = vec![
            step("extract", &[], "done", StepStatus::Done),
            step("clean", &["extract"], "done", StepStatus::Done),
            step("left", &["clean"], "done", StepStatus::Running),
            step("right", &["clean"], "done", StepStatus::Failed),
            step("join", &["left", "right"], "done", StepStatus::Waiting),
            step("alarm", &["right"], "failed", StepStatus::Pending),
        ];
        steps[0].from = Some("f1".into());
        steps[3].error = Some("no\ndisk".into());
        let wanted = [
            "✔ extract  done  (in f1)",
            "✔ clean    done",
            "├─ ● left     running",
            "└─ ✘ right    failed  (no disk)",
            "   ├─ · join     waiting  (after left, right)",
            "   └─ ○ alarm    pending  (after right; on failed)",
        ];
        assert_eq!(draw(&steps), wanted);
    }
}
