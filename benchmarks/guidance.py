"""What guidance buys and costs, beside the number of steps: guidance_SAMPLES.md.

    python benchmarks/guidance.py Save_model/model_DDPM_large.pth
"""

from measure import (ROOT, checkpoint_arguments, command, distance_to_test, drawn_once, load_model, machine, mnist,
                     training_distance, unclear)


def main() -> None:
    parser = checkpoint_arguments(__doc__)
    parser.set_defaults(samples=1000)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 1.25, 1.5, 2.0])
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 15])
    args = parser.parse_args()
    model = load_model(args)
    table = ["| guidance | steps | evaluations | Frechet distance | unclear |", "|---|---|---|---|---|"]
    for guidance in args.guidance:
        for steps in args.steps:
            pixels, _ = drawn_once(args.model, model, range(args.samples), args.seed, steps, "dpm_solver", guidance,
                                   precision=args.precision)
            evaluations = steps * (1 + (guidance != 1))
            table.append(f"| {guidance:g} | {steps} | {evaluations} | {distance_to_test(pixels):.2f} | {unclear(pixels):.1%} |")
            print(table[-1], flush=True)
    text = [f"`{command(args)}` on {machine()}:", "",
            f"The Frechet distance of {args.samples:,} samples of dpm_solver to the 10,000 test images, on features of a small",
            f"classifier, the median of three seeds; as many training images are at {training_distance(args.samples):.2f}, the",
            "median of up to ten sets. Unclear: the share of these samples to which three classifiers give no digit, on average,",
            f"a probability of 0.9; of the test images {unclear(mnist('t10k')):.1%}.", "", *table]
    (ROOT / "benchmarks" / f"guidance_{args.samples}.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
