//! `virtseal jobs …`, and what starts a job.

use std::io::IsTerminal;

use clap::{Args, Subcommand};
use futures_util::{StreamExt, pin_mut};
use indicatif::{ProgressBar, ProgressStyle};

use super::client::Client;
use super::print::Printer;
use crate::api::{HostProxy, JobRequest, JobStarted, JobView};
use crate::model::problem::{Code, Problem};
use crate::terminal::visible;

#[derive(Debug, Subcommand)]
pub(super) enum JobsCommand {
    /// List the last jobs, and the copies of envelopes that are behind.
    List,
    /// Follow a job, or the one that runs, until it ends.
    Watch {
        /// Its number.
        id: Option<i64>,
    },
    /// End a job, or the one that runs, where it is. What it changed stays.
    Abort {
        /// Its number.
        id: Option<i64>,
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
    }
}

pub(super) fn request(
    kind: &str,
    provider: Option<String>,
    to: Option<String>,
    vm: Option<String>,
) -> JobRequest {
    JobRequest {
        kind: kind.to_owned(),
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

/// Ends like the job: whatever it left behind is a failure.
async fn watch(id: Option<i64>, client: &mut Client, printer: &Printer) -> Result<(), Problem> {
    let bar = match printer.shows_progress() {
        true => ProgressBar::new(0),
        false => ProgressBar::hidden(),
    };
    bar.set_style(
        ProgressStyle::with_template("{msg} {bar:40} {pos}/{len} {eta}").expect("the template is valid"),
    );
    let last = follow(id, &bar, client, printer).await;
    bar.finish_and_clear();
    let last = last?;
    printer.job(&last)?;
    match last.state.as_str() {
        "done" => Ok(()),
        "incomplete" => Err(Problem::new(
            Code::Failed,
            format!(
                "job {} left {} envelopes behind: {}",
                last.id,
                last.left,
                last.reasons.join("; ")
            ),
        )
        .next("mend what it says, then start the same job again")),
        state => Err(Problem::new(Code::Failed, format!("job {} is {state}", last.id)).next("virtseal jobs")),
    }
}

async fn follow(
    id: Option<i64>,
    bar: &ProgressBar,
    client: &mut Client,
    printer: &Printer,
) -> Result<JobView, Problem> {
    let (mut last, mut broken): (Option<JobView>, _) = (None, None);
    {
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
    }
    match (broken, last) {
        (Some(error), _) => Err(client.broken(&error)),
        (None, Some(view)) if view.state != "running" => Ok(view),
        (None, _) => Err(
            Problem::new(Code::Unreachable, "virtseald ended before the job did")
                .next("start virtseald again: the job goes on, virtseal jobs watch follows it"),
        ),
    }
}

fn show(view: &JobView, before: Option<&JobView>, bar: &ProgressBar, printer: &Printer) {
    bar.set_message(visible(&view.task).into_owned());
    bar.set_length(view.total.max(view.seen).unsigned_abs());
    bar.set_position(view.seen.unsigned_abs());
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
    super::print::question(question).map_err(failed)?;
    std::io::stdin().read_line(&mut line).map_err(failed)?;
    Ok(line.trim().to_owned())
}
