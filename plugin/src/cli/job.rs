//! `virtseal jobs …`, and what starts a job.

use std::io::IsTerminal;

use clap::{Args, Subcommand};
use futures_util::{StreamExt, pin_mut};
use indicatif::{ProgressBar, ProgressStyle};

use super::client::Client;
use super::print::{Printer, progress};
use crate::api::{HostProxy, JobRequest, JobStarted, JobState, JobView, SweepKind};
use crate::model::problem::{Code, Problem};
use crate::terminal::visible;

#[derive(Debug, Subcommand)]
pub(super) enum JobsCommand {
    /// List the last jobs, and the copies of envelopes that are behind.
    List,
    /// Follow a job, or the only one that runs, until it ends.
    Watch {
        /// Its number.
        id: Option<i64>,
    },
    /// End a job, or the only one that runs, where it is. The envelopes that it changed stay so; a volume that it has not finished
    /// goes.
    Abort {
        /// Its number.
        id: Option<i64>,
    },
    /// Start a job once more that was aborted, has failed or has left something behind.
    Resume {
        /// Its number.
        id: i64,
        #[command(flatten)]
        watch: WatchArgs,
    },
}

#[derive(Debug, Args)]
pub(super) struct WatchArgs {
    /// Follow the job until it ends.
    #[arg(long)]
    watch: bool,
}

pub(super) async fn run(
    command: Option<JobsCommand>,
    client: &mut Client,
    printer: &Printer,
) -> Result<(), Problem> {
    match command {
        None | Some(JobsCommand::List) => {
            printer.jobs(&client.call(async |host| host.list_jobs().await).await?)
        }
        Some(JobsCommand::Watch { id }) => watch(id, client, printer).await,
        Some(JobsCommand::Abort { id }) => {
            printer.job(&client.call(async |host| host.abort_job(id).await).await?.job)
        }
        Some(JobsCommand::Resume { id, watch }) => {
            let resumed = client.call(async |host| host.resume_job(id).await).await?;
            started(&resumed, &watch, client, printer).await
        }
    }
}

pub(super) fn request(
    kind: SweepKind,
    provider: Option<String>,
    to: Option<String>,
    vm: Option<String>,
) -> JobRequest {
    JobRequest {
        kind,
        provider,
        to,
        vm,
    }
}

pub(super) async fn start(
    request: &JobRequest,
    args: &WatchArgs,
    client: &mut Client,
    printer: &Printer,
) -> Result<(), Problem> {
    let job = client.call(async |host| host.start_job(request).await).await?;
    started(&job, args, client, printer).await
}

pub(super) async fn started(
    job: &JobStarted,
    args: &WatchArgs,
    client: &mut Client,
    printer: &Printer,
) -> Result<(), Problem> {
    for warning in &job.warnings {
        printer.warn(warning);
    }
    if args.watch {
        return watch(Some(job.job.id), client, printer).await;
    }
    printer.job(&job.job)?;
    printer.advise(&format!("Follow it with virtseal jobs watch {}", job.job.id))
}

async fn watch(id: Option<i64>, client: &mut Client, printer: &Printer) -> Result<(), Problem> {
    let last = follow(id, client, printer).await?;
    printer.job(&last)?;
    judge(&last)
}

/// Ends like the job: whatever it left behind, or undone, is a failure.
pub(super) fn judge(job: &JobView) -> Result<(), Problem> {
    let resume = format!("mend what it says, then virtseal jobs resume {}", job.id);
    match job.state {
        JobState::Done => Ok(()),
        JobState::Incomplete => Err(Problem::new(
            Code::Failed,
            format!(
                "job {} left {} envelopes behind: {}",
                job.id,
                job.left,
                job.reasons.join("; ")
            ),
        )
        .next(resume)),
        JobState::Failed => match &job.problem {
            Some(problem) => Err(
                Problem::new(Code::from_number(problem.code), problem.message.clone())
                    .next(problem.next.clone().unwrap_or(resume)),
            ),
            None => {
                Err(Problem::new(Code::Failed, format!("job {} has failed", job.id)).next("virtseal jobs"))
            }
        },
        JobState::Running | JobState::Aborted => Err(Problem::new(
            Code::Failed,
            format!("job {} is {}", job.id, job.state.as_str()),
        )
        .next("virtseal jobs")),
    }
}

/// Follows a job, or the only one that runs, until it ends. Whoever stops following stops nothing.
pub(super) async fn follow(
    id: Option<i64>,
    client: &mut Client,
    printer: &Printer,
) -> Result<JobView, Problem> {
    let bar = match printer.shows_progress() {
        true => ProgressBar::new(0),
        false => ProgressBar::hidden(),
    };
    bar.set_style(ProgressStyle::with_template("{prefix} {bar:40} {msg}").expect("the template is valid"));
    let last = follow_with(id, &bar, client, printer).await;
    bar.finish_and_clear();
    last
}

async fn follow_with(
    id: Option<i64>,
    bar: &ProgressBar,
    client: &mut Client,
    printer: &Printer,
) -> Result<JobView, Problem> {
    let (mut last, mut broken): (Option<JobView>, _) = (None, None);
    match client.connection().watch_job(id).await {
        Ok(replies) => {
            pin_mut!(replies);
            while let Some(reply) = replies.next().await {
                match reply {
                    Ok(view) => {
                        let view = view.map_err(Problem::from)?.job;
                        show(&view, last.as_ref(), bar, printer);
                        last = Some(view);
                    }
                    Err(error) => {
                        broken = Some(error);
                        break;
                    }
                }
            }
        }
        Err(error) => broken = Some(error),
    }
    match (broken, last) {
        (None, Some(view)) if view.state != JobState::Running => Ok(view),
        (Some(error), None) => Err(client.broken(&error)),
        (_, last) => Err(
            Problem::new(Code::Unreachable, "virtseald ended before the job did").next(format!(
                "start virtseald again: the job goes on, virtseal jobs watch{} follows it",
                last.map_or_else(String::new, |job| format!(" {}", job.id))
            )),
        ),
    }
}

fn show(view: &JobView, before: Option<&JobView>, bar: &ProgressBar, printer: &Printer) {
    bar.set_prefix(visible(&view.task).into_owned());
    bar.set_length(view.total.max(view.seen).unsigned_abs());
    bar.set_position(view.seen.unsigned_abs());
    bar.set_message(progress(view));
    if let Some(waiting) = &view.waiting
        && before.is_none_or(|before| before.waiting.as_ref() != Some(waiting))
    {
        bar.suspend(|| printer.warn(&format!("job {} waits: {waiting}", view.id)));
    }
}

/// What was typed to confirm a loss: as an option, or at a prompt.
pub(super) fn typed(given: Option<String>, question: &str) -> Result<String, Problem> {
    if let Some(given) = given {
        return Ok(given);
    }
    if !std::io::stdin().is_terminal() {
        return Ok(String::new());
    }
    let failed = |error: std::io::Error| Problem::from_error(Code::Failed, "can't ask", &error);
    let mut line = String::new();
    super::out::question(question).map_err(failed)?;
    std::io::stdin().read_line(&mut line).map_err(failed)?;
    Ok(line.trim().to_owned())
}
